"""Data and backbones as people have them, in whole runs: used as they are meant, or refused before weights load."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


END = "<|endoftext|>"
TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"place": "Graz"}}}
RAIN = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
PAIR = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
WITHOUT_END = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def learned(result, tokenizer):
    """The text of the first row, with what is trained in ⟦brackets⟧."""
    batch = result.check().batches()[0]
    text, was_trained = "", False
    for token, label in zip(batch["input_ids"][0], batch["labels"][0]):
        text += "⟦" * (label != -100 and not was_trained) + "⟧" * (label == -100 and was_trained)
        text += tokenizer.decode([token])
        was_trained = label != -100
    return text.rstrip("\n") + "⟧" * was_trained


def refusal(result):
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr()
    assert "Loading weights" not in result.stderr()
    assert result.batches() == []
    (sentence,) = result.errors()
    return sentence


# ---- rows


def test_tools_and_calls_are_seen_and_trained_without_a_template(recipes, material, tmp_path):
    data = write_rows(tmp_path / "a.jsonl", [{"messages": RAIN, "tools": [TOOL], "id": 1}] * 4)
    result = recipes.run("sft", **material.sft_options(dataset_name=data, max_length=512, max_steps=1, learning=True))
    prompt, _, answer = learned(result, material.tokenizer()).partition("⟦")
    assert json.dumps(TOOL) in prompt
    assert answer.startswith(
        '<tool_call>\n{"name": "rain", "arguments": {"place": "Graz"}}\n</tool_call><|endoftext|>'
    )
    assert f"{data}: not read, and not trained on: id." in (result.record / "stdout.0").read_text()


@pytest.mark.parametrize("packing", [None, True])
def test_all_answers_are_trained(recipes, material, packing):
    options = {"dataset_name": material.conversations, "train_on": "all_answers", "packing": packing}
    result = recipes.run("sft", **material.sft_options(**options, max_steps=1, learning=True))
    text = learned(result, material.tokenizer())
    assert "⟦Hello.<|endoftext|>\n⟧" in text
    assert text.count("⟦") == text.count("⟧") == 2 * text.count("<|im_start|>system")
    counts = result.metrics["sources"]["sources"][0]
    assert counts["documents"] == 24
    assert "Tokens per source, in one pass" in (result.record / "stdout.0").read_text()


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        (
            [{"messages": PAIR}, {"messages": None}],
            {},
            "a.jsonl, line 2: `messages` must be a list of messages, got null.",
        ),
        ([{"messages": PAIR[1:]}], {}, "a.jsonl, line 1: the row begins with an answer"),
        ([{"messages": PAIR}], {"chat_template": WITHOUT_END}, "never with the end token ('<|endoftext|>')"),
        ([{"messages": PAIR}], {"assistant_only_loss": True}, "choose what is trained with --train_on all_answers"),
        ([{"messages": PAIR}], {"completion_only_loss": False}, "`completion_only_loss` has no effect in sft.py"),
        ([{"messages": PAIR, "images": ["a.png"]}], {}, "line 1: the column `images` is not read: only text"),
    ],
    ids=["null_row", "only_an_answer", "no_end_token", "assistant_only", "completion_only", "images"],
)
def test_what_would_be_lost_or_never_learned_is_refused(recipes, material, tmp_path, rows, options, sentence):
    if "chat_template" in options:
        (tmp_path / "own.jinja").write_text(options["chat_template"])
        options = {"chat_template": tmp_path / "own.jinja"}
    data = write_rows(tmp_path / "a.jsonl", rows)
    assert sentence in refusal(recipes.run("sft", **material.sft_options(dataset_name=data, **options)))


def test_rows_that_are_cut_or_dropped_are_told(recipes, material, tmp_path):
    rows = [{"prompt": "Hi?", "completion": "Hello."}] * 3 + [{"prompt": "Hi? " * 90, "completion": "Hello."}]
    rows += [{"prompt": "Hi?", "completion": "Hello. " * 90}]
    data = write_rows(tmp_path / "a.jsonl", rows)
    result = recipes.run("sft", **material.sft_options(dataset_name=data, max_length=64, max_steps=1)).check()
    (counts,) = result.metrics["sources"]["sources"]
    assert (counts["documents"], counts["documents_cut"], counts["documents_dropped"]) == (5, 1, 1)
    assert counts["tokens_read"] > counts["tokens_cut"] + counts["tokens_dropped"] > 0
    told = (result.record / "stdout.0").read_text()
    assert "1 of 5 rows dropped: longer than 64 tokens." in told
    assert "1 of 5 rows cut: longer than 64 tokens." in told


# ---- sources


def test_rows_for_testing_are_kept_out_of_training(recipes, material, tmp_path):
    shutil.copy(material.text, tmp_path / "train.jsonl")
    shutil.copy(material.heldout, tmp_path / "test.jsonl")
    data = {"dataset_name": tmp_path, "heldout_dataset": tmp_path, "max_steps": -1, "num_train_epochs": 1}
    result = recipes.run("cpt", **material.cpt_options(**data)).check()
    assert result.metrics["sources"]["sources"][0]["documents"] == 60
    assert result.metrics["heldout_loss"] > 0
    told = (result.record / "stdout.0").read_text()
    assert f"{tmp_path}: the split 'train' is train.jsonl; left out: test.jsonl (test)." in told
    assert f"{tmp_path}: the split 'test' is test.jsonl; left out: train.jsonl (train)." in told


def test_configurations_are_chosen_in_both_recipes(recipes, material, tmp_path):
    for name in ("main", "other"):
        (tmp_path / name).mkdir()
        shutil.copy(material.questions, tmp_path / name / "train.jsonl")
        shutil.copy(material.questions, tmp_path / name / "test.jsonl")
    chosen = {"dataset_name": tmp_path, "dataset_config": "main", "max_steps": -1, "num_train_epochs": 1}
    heldout = {"heldout_dataset": tmp_path, "heldout_config": "other", "max_heldout_rows": 4}
    result = recipes.run("sft", **material.sft_options(**chosen, **heldout)).check()
    assert len(result.losses) == 24 / 4
    wrong = material.cpt_options(heldout_dataset=tmp_path, heldout_config="third")
    assert "has no configuration 'third'" in refusal(recipes.run("cpt", **wrong))


# ---- backbones


@pytest.fixture(scope="module")
def backbones(material, tmp_path_factory):
    """Llamas with a tokenizer that lacks the padding token, or the end token."""
    folder = tmp_path_factory.mktemp("llamas")
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    for name, tokens in {"no_pad": {"eos_token": END}, "no_end": {"pad_token": END}}.items():
        model.save_pretrained(folder / name)
        file = str(Path(material.backbone) / "tokenizer.json")
        PreTrainedTokenizerFast(tokenizer_file=file, **tokens).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("recipe", "name", "options"),
    [
        ("cpt", "no_pad", {}),
        ("sft", "no_pad", {}),
        ("sft", "no_pad", {"packing": True}),
        ("cpt", "no_end", {"eos_token": END}),
        ("sft", "no_end", {"eos_token": END}),
    ],
)
def test_tokenizers_that_lack_a_token_train(recipes, material, backbones, recipe, name, options):
    options = {"model_name_or_path": backbones / name, "max_length": 512, "max_steps": 1, "learning": True, **options}
    make = material.cpt_options if recipe == "cpt" else material.sft_options
    result = recipes.run(recipe, **make(**options))
    assert END in learned(result, material.tokenizer())
    saved = PreTrainedTokenizerFast.from_pretrained(result.output_dir)
    assert (saved.eos_token, saved.pad_token) == (END, END)


def test_a_tokenizer_without_an_end_token_is_refused(recipes, material, backbones):
    for recipe, make in (("cpt", material.cpt_options), ("sft", material.sft_options)):
        sentence = refusal(recipes.run(recipe, **make(model_name_or_path=backbones / "no_end")))
        assert "has no end token, so nothing would end: name one of its tokens with --eos_token" in sentence


def test_a_template_is_given_to_the_tokenizer_and_the_backbone_stays_as_it_is(recipes, material, tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "own.jinja").write_text(template)
    result = recipes.run("cpt", **material.cpt_options(chat_template_path=tmp_path / "own.jinja", max_steps=1)).check()
    assert (result.output_dir / "chat_template.jinja").read_text() == template
    assert all("parscale_" in name for name in result.tensors)


def test_a_pointer_in_the_place_of_weights_is_refused(recipes, material, tmp_path):
    backbone = shutil.copytree(material.backbone, tmp_path / "backbone")
    (backbone / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    sentence = refusal(recipes.run("cpt", **material.cpt_options(model_name_or_path=backbone)))
    assert "model.safetensors is a pointer of git-lfs and not the file: run `git lfs pull` in" in sentence
