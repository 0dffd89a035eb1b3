"""`parscale inspect-data`: what a recipe would make of some data, told before it runs."""

import json

import datasets
import pytest

from parscale_adapt.data import (
    DataSource,
    InstructionSettings,
    load_rows,
    prepare_instructions,
    say,
    set_chat_template,
)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(question, answer, **more):
    return {"prompt": question, "completion": answer, **more}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    say.cache_clear()


def test_format_example_and_counts_are_shown_for_each_file(parscale, material):
    code, out, err = parscale("inspect-data", material.questions, material.text, "--tokenizer", material.backbone)
    assert code == 0, err
    questions, text = out.split(f"\n{material.text}\n")
    assert "`prompt` and `completion`, for sft.py" in questions
    assert "24" in questions
    assert "⟦<|im_start|>user" in questions
    assert "raw text in `text`, for cpt.py" in text
    assert "60" in text


def test_the_figures_are_those_of_the_recipe(parscale, material, tmp_path):
    rows = [pair("Hi?", "Hello."), pair("Hi? " * 30, "Hello."), pair("Hi?", "Hello. " * 30, id=1)]
    data, report = write_rows(tmp_path / "a.jsonl", rows), tmp_path / "report.json"
    options = ("--tokenizer", material.backbone, "--max-length", 64, "--json", report)
    code, out, err = parscale("inspect-data", data, *options)
    assert code == 0, err
    assert "1 of 3 rows, longer than 64 tokens" in out
    figures = json.loads(report.read_text())
    assert figures["counted_in"] == "tokens"
    (found,) = figures["sources"]

    tokenizer = material.tokenizer()
    set_chat_template(tokenizer, None)
    settings = InstructionSettings(64, end_token_ids=frozenset({tokenizer.eos_token_id}))
    (counts,) = prepare_instructions(load_rows(DataSource(str(data))), tokenizer, settings, "a")[1].sources
    assert found["rows"] == counts.documents
    assert found["tokens"] == counts.tokens_read
    assert found["tokens_trained"] == counts.tokens_trained
    assert (found["rows_cut"], found["rows_dropped"]) == (counts.documents_cut, counts.documents_dropped) == (1, 1)
    assert found["not_read"] == {"id": 1}


def test_rows_that_a_recipe_would_refuse_are_all_named(parscale, tmp_path):
    data = write_rows(tmp_path / "a.jsonl", [pair("Hi?", "Hello."), pair("Hi?", None), pair("Hi?", "")])
    code, out, _ = parscale("inspect-data", data)
    assert code == 1
    assert "Counted in bytes" in out
    assert f"can't be used: {data}, line 2: `prompt` and `completion` must both hold text" in out
    assert f"can't be used: {data}, line 3: `completion` is empty, which would teach to say nothing." in out


def test_text_that_breaks_off_is_shown_up_to_there(parscale, tmp_path):
    data = write_rows(
        tmp_path / "a.jsonl", [{"text": f"document {number}"} for number in range(100)] + [{"text": None}]
    )
    code, out, _ = parscale("inspect-data", data)
    assert code == 1
    assert "ocument 0<|endoftext|>" in out
    assert "line 101: the field 'text' must hold text, got null." in out


def test_what_is_trained_is_chosen_as_in_the_recipe(parscale, material, tmp_path):
    for train_on, number in (("last_answer", 1), ("all_answers", 2)):
        code, out, err = parscale("inspect-data", material.conversations, "--train-on", train_on, "--rows", 1)
        assert code == 0, err
        assert out.count("⟧") == number + 1  # and once in the title
        assert "the first; --rows looks at more" in out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--recipe", "dpo"], "`recipe` must be sft or cpt, got 'dpo'."),
        (["--max-length", "64"], "`max_length` and `eos_token` speak of tokens: name the backbone with --tokenizer."),
        (["--split", "test"], "has no split 'test'"),
        (
            ["--train-on", "questions"],
            "`train_on` must be one of last_answer, all_answers, all_text, got 'questions'.",
        ),
    ],
)
def test_wrong_options_are_refused(parscale, material, options, sentence):
    code, _, err = parscale("inspect-data", material.questions, *options)
    assert code == 1
    assert sentence in err


def test_a_tokenizer_that_is_a_pointer_is_refused(parscale, material, tmp_path):
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    code, _, err = parscale("inspect-data", material.questions, "--tokenizer", tmp_path)
    assert code == 1
    assert "tokenizer.json is a pointer of git-lfs and not the file" in err


def test_the_recipe_may_be_named(parscale, tmp_path):
    data = write_rows(tmp_path / "a.jsonl", [{"text": "raw", "prompt": "Hi?", "completion": "Hello."}])
    assert "for sft.py" in parscale("inspect-data", data)[1]
    assert "raw text in `text`, for cpt.py" in parscale("inspect-data", data, "--recipe", "cpt")[1]
