"""Questions and answers as the SFT recipe reads them."""

import json

import pytest

from parscale_adapt.training import InstructionArguments, load_instructions


QUESTION = [{"role": "user", "content": "What is it?"}]
ANSWER = [{"role": "assistant", "content": "A test."}]


def load(tmp_path, tokenizer, *rows, **options):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_instructions(InstructionArguments(dataset_name=str(path), **options), tokenizer)


@pytest.fixture
def tokenizer(material):
    return material.tokenizer()


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"prompt": "What is it?", "completion": "A test."}, {}),
        ({"prompt": QUESTION, "completion": ANSWER}, {}),
        ({"messages": QUESTION + ANSWER}, {}),
        (
            {"question": "What is it?", "answer": "A test.", "id": 3},
            {"prompt_field": "question", "completion_field": "answer"},
        ),
    ],
    ids=["text", "messages_in_both", "conversation", "named_columns"],
)
def test_every_layout_becomes_prompt_and_completion(tmp_path, tokenizer, row, options):
    train, heldout = load(tmp_path, tokenizer, row, **options)
    assert train[:] == {"prompt": [QUESTION], "completion": [ANSWER]}
    assert heldout is None


def test_held_out_rows_are_limited(tmp_path, tokenizer):
    rows = [{"prompt": str(number), "completion": "x"} for number in range(5)]
    _, heldout = load(tmp_path, tokenizer, *rows, heldout_dataset=str(tmp_path / "data.jsonl"), max_heldout_rows=2)
    assert [prompt[0]["content"] for prompt in heldout["prompt"]] == ["0", "1"]


def test_without_a_template_an_answer_ends_with_the_tokenizers_end_token(tmp_path, tokenizer):
    assert tokenizer.chat_template is None
    load(tmp_path, tokenizer, {"prompt": "x", "completion": "y"})
    text = tokenizer.apply_chat_template(QUESTION + ANSWER, tokenize=False)
    assert text == ("<|im_start|>user\nWhat is it?<|endoftext|>\n<|im_start|>assistant\nA test.<|endoftext|>\n")
    prompt = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)


@pytest.mark.parametrize("given", [False, True])
def test_the_tokenizers_own_template_gives_way_to_a_file_alone(tmp_path, tokenizer, given):
    tokenizer.chat_template = "own"
    file = tmp_path / "template.jinja"
    file.write_text("file")
    load(tmp_path, tokenizer, {"prompt": "x", "completion": "y"}, chat_template=str(file) if given else None)
    assert tokenizer.chat_template == ("file" if given else "own")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "needs a column `messages`, or `prompt` and `completion`; it has text"),
        ({"prompt": "x", "completion": None}, "found 'x' and None"),
        ({"prompt": QUESTION, "completion": "y"}, "needs text, or lists of messages"),
        ({"messages": QUESTION}, "must end with an answer of the assistant"),
    ],
)
def test_rows_that_are_no_instructions_are_refused(tmp_path, tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, tokenizer, row)


@pytest.mark.parametrize(("name", "content"), [("a.txt", "text"), ("a.jsonl", ""), ("a.jsonl", "{broken\n")])
def test_files_that_can_not_be_read_are_refused(tmp_path, tokenizer, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        load_instructions(InstructionArguments(dataset_name=str(tmp_path / name)), tokenizer)
