"""Questions and answers as the SFT recipe reads them."""

import json
from types import SimpleNamespace

import pytest
from trl import SFTConfig

from parscale_adapt.training import (
    BackboneArguments,
    InstructionArguments,
    load_instructions,
    prepare_instruction_training,
)


QUESTION = [{"role": "user", "content": "What is it?"}]
ANSWER = [{"role": "assistant", "content": "A test."}]
PAIR = {"prompt": "What is it?", "completion": "A test."}


def settings(**changes):
    """What is read of TRL's arguments."""
    fields = {"max_length": 256, "truncation_mode": "keep_start", "dataset_num_proc": None, "shuffle_dataset": False}
    return SimpleNamespace(**{**fields, "seed": 0, **changes})


def load(tmp_path, tokenizer, *rows, training=None, **options):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = InstructionArguments(dataset_name=str(path), **options)
    return load_instructions(arguments, tokenizer, training or settings())


def trained(tokenizer, rows):
    return [tokenizer.decode([label for label in labels if label != -100]) for labels in rows["labels"]]


@pytest.fixture
def tokenizer(material):
    return material.tokenizer()


@pytest.mark.parametrize(
    ("row", "options"),
    [
        (PAIR, {}),
        ({"prompt": QUESTION, "completion": ANSWER}, {}),
        ({"messages": QUESTION + ANSWER}, {}),
        (
            {"question": "What is it?", "answer": "A test.", "id": 3},
            {"prompt_field": "question", "completion_field": "answer"},
        ),
    ],
    ids=["text", "messages_in_both", "conversation", "named_columns"],
)
def test_every_layout_becomes_the_same_row(tmp_path, tokenizer, row, options):
    train, heldout, report = load(tmp_path, tokenizer, row, **options)
    assert tokenizer.decode(train[0]["input_ids"]) == (
        "<|im_start|>user\nWhat is it?<|endoftext|>\n<|im_start|>assistant\nA test.<|endoftext|>\n"
    )
    assert trained(tokenizer, train) == ["A test.<|endoftext|>\n"]
    assert train.column_names == ["input_ids", "labels"]
    assert heldout is None
    assert report.sources[0].documents == 1


def test_held_out_rows_are_limited_and_not_counted(tmp_path, tokenizer):
    rows = [{"prompt": str(number), "completion": f"x{number}"} for number in range(5)]
    heldout_dataset = str(tmp_path / "data.jsonl")
    train, heldout, report = load(tmp_path, tokenizer, *rows, heldout_dataset=heldout_dataset, max_heldout_rows=2)
    assert trained(tokenizer, heldout) == ["x0<|endoftext|>\n", "x1<|endoftext|>\n"]
    assert len(train) == report.sources[0].documents == 5


def test_held_out_rows_without_a_target_are_refused(tmp_path, tokenizer):
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"prompt": "word " * 99, "completion": "x"}))
    with pytest.raises(
        ValueError, match=r"held out: .*none of 1 rows has an answer to train on within `max_length` 64"
    ):
        load(
            tmp_path,
            tokenizer,
            PAIR,
            training=settings(max_length=64),
            heldout_dataset=str(tmp_path / "heldout.jsonl"),
        )


def test_without_a_template_an_answer_ends_with_the_tokenizers_end_token(tmp_path, tokenizer):
    assert tokenizer.chat_template is None
    load(tmp_path, tokenizer, PAIR)
    text = tokenizer.apply_chat_template(QUESTION + ANSWER, tokenize=False)
    assert text == ("<|im_start|>user\nWhat is it?<|endoftext|>\n<|im_start|>assistant\nA test.<|endoftext|>\n")
    prompt = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)


@pytest.mark.parametrize("given", [False, True])
def test_the_tokenizers_own_template_gives_way_to_a_file_alone(tmp_path, tokenizer, given):
    render = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.chat_template = f"own{render}"
    file = tmp_path / "template.jinja"
    file.write_text(f"file{render}")
    load(tmp_path, tokenizer, PAIR, chat_template=str(file) if given else None)
    assert tokenizer.chat_template == ("file" if given else "own") + render


def test_rows_are_shuffled_where_that_is_asked_for(tmp_path, tokenizer):
    rows = [{"prompt": str(number), "completion": f"x{number}"} for number in range(20)]
    plain, shuffled = (
        trained(tokenizer, load(tmp_path, tokenizer, *rows, training=settings(shuffle_dataset=wanted))[0])
        for wanted in (False, True)
    )
    assert sorted(plain) == sorted(shuffled)
    assert plain != shuffled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"heldout_dataset": "x"},
            "`heldout_dataset` has no effect on the embedded data: name data with --dataset_name",
        ),
        ({"dataset_config": "main"}, "`dataset_config` has no effect on the embedded data"),
        ({"dataset_name": "x", "heldout_split": "test"}, "have no effect without --heldout_dataset"),
        (
            {"dataset_name": "x", "heldout_dataset": "x", "max_heldout_rows": 0},
            "`max_heldout_rows` must be at least 1",
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        InstructionArguments(**options)


def test_two_templates_are_refused(tmp_path):
    backbone = BackboneArguments()
    backbone.explicit_settings = frozenset({"chat_template", "chat_template_path"})
    training = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="`chat_template` and `chat_template_path` both name a chat template"):
        prepare_instruction_training(training, backbone)
