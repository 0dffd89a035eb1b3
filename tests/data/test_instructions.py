"""Data sets of questions and answers: what is counted, told and refused of all rows together."""

import json

import datasets
import pytest
from support.tiny_tokenizers import byte_tokenizer

from parscale_adapt.data import (
    CHATML,
    DataSource,
    InstructionSettings,
    load_rows,
    prepare_instructions,
    say,
)


END = "<|endoftext|>\n"


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    say.cache_clear()


@pytest.fixture
def prepare(tokenizer, tmp_path):
    def run(rows, num_processes=None, max_length=None, **settings):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = InstructionSettings(max_length, end_token_ids=frozenset({tokenizer.eos_token_id}), **settings)
        return prepare_instructions(load_rows(DataSource(str(path))), tokenizer, settings, "data", num_processes)

    return run


def pair(question, answer):
    return {"prompt": question, "completion": answer}


def test_what_is_read_trained_cut_and_dropped_adds_up(tokenizer, prepare, capsys):
    rows = [pair("?", "Short."), pair("?", "Long. " * 20), pair("Long? " * 20, "Short."), pair("?", "Short.")]
    lengths = [len(tokenizer.apply_chat_template(conversation(row))["input_ids"]) for row in rows]
    limit = 50
    kept, report = prepare(rows, max_length=limit)
    (counts,) = report.sources
    assert (counts.documents, counts.documents_cut, counts.documents_dropped) == (4, 1, 1)
    assert counts.tokens_read == sum(lengths)
    assert counts.tokens_cut == lengths[1] - limit
    assert counts.tokens_dropped == lengths[2]
    trained = sum(label != -100 for row in kept for label in row["labels"])
    assert counts.tokens_trained == report.num_tokens_trained == trained
    assert [len(row["input_ids"]) for row in kept] == [lengths[0], limit, lengths[3]]
    assert report.to_dict()["counted_over"] == "one pass"
    told = capsys.readouterr().out
    assert "data: 1 of 4 rows dropped: longer than 50 tokens." in told
    assert "data: 1 of 4 rows cut: longer than 50 tokens." in told


def conversation(row):
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def test_rows_that_fit_are_neither_cut_nor_mentioned(tokenizer, prepare, capsys):
    length = len(tokenizer.apply_chat_template(conversation(pair("?", "!")))["input_ids"])
    (counts,) = prepare([pair("?", "!")], max_length=length)[1].sources
    assert (counts.documents_cut, counts.documents_dropped, counts.tokens_cut) == (0, 0, 0)
    assert capsys.readouterr().out == ""


def test_bad_rows_are_counted_and_the_first_is_named(prepare, tmp_path):
    rows = [pair("?", "!"), pair("?", ""), pair("?", None), pair("?", "!")]
    with pytest.raises(ValueError, match=r"line 2: `completion` is empty.*\. 1 more rows can't be used either\."):
        prepare(rows)


def test_what_is_not_read_is_told_once(prepare, capsys):
    rows = [{**pair("?", str(number)), "id": number + 1, "empty": None} for number in range(3)]
    for _ in range(2):
        prepare(rows)
    assert capsys.readouterr().out == "data: not read, and not trained on: id.\n"


def test_several_processes_give_the_same_rows(prepare):
    rows = [{**pair(f"{number}?", "word " * number + "."), "id": number} for number in range(1, 9)]
    alone, together = (prepare(rows, num_processes=number)[0] for number in (None, 2))
    assert alone[:] == together[:]


def test_a_changed_file_or_setting_is_prepared_anew(tokenizer, prepare):
    def texts(*arguments, **settings):
        rows = prepare(*arguments, **settings)[0]
        return [tokenizer.decode([label for label in labels if label != -100]) for labels in rows["labels"]]

    assert texts([pair("?", "before")]) == [f"before{END}"]
    assert texts([pair("?", "behind")]) == [f"behind{END}"]
    assert texts([pair("?", "behind")], train_on="all_text") != [f"behind{END}"]


def test_rows_of_a_table_are_named_by_their_number(tokenizer):
    table = datasets.Dataset.from_list([pair("?", "!"), pair("?", None)])
    settings = InstructionSettings(None, end_token_ids=frozenset({tokenizer.eos_token_id}))
    with pytest.raises(ValueError, match="hub/name, row 2: `prompt` and `completion` must both hold text"):
        prepare_instructions(table, tokenizer, settings, "hub/name")


def test_only_the_main_process_tells(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    say("Not me.")
    assert capsys.readouterr().out == ""
