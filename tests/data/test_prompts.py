"""Questions to be answered: read from text and messages, with their other columns; and sums of two digits."""

import json

import pytest
from datasets import Dataset
from support.tiny_tokenizers import byte_tokenizer

from parscale_adapt.data import (
    DataSource,
    PromptSettings,
    load_rows,
    prepare_prompts,
    set_chat_template,
    sums_of_digits,
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer, None)
    return tokenizer


def prepared(rows, tokenizer, max_length=400, **fields):
    return prepare_prompts(Dataset.from_list(rows), tokenizer, PromptSettings(max_length, **fields), "questions")


def test_texts_become_messages_of_the_user_or_stay_as_they_are(tokenizer):
    rows = [{"question": "1+1?", "answer": "2"}]
    chat, _ = prepared(rows, tokenizer, prompt_field="question")
    assert chat[:] == {"prompt": [[{"role": "user", "content": "1+1?"}]], "answer": ["2"]}
    text, report = prepared(rows, tokenizer, prompt_field="question", prompt_format="text")
    assert text[:] == {"prompt": ["1+1?"], "answer": ["2"]}
    assert report.sources[0].tokens_read == len(tokenizer("1+1?").input_ids)


def test_conversations_are_read_with_whatever_else_rows_of_a_file_have(tokenizer, tmp_path):
    messages = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "1+1?"}]
    rows = [{"prompt": messages, "answer": 2}, {"prompt": "2+2?", "level": {"grade": 1}}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts, report = prepare_prompts(load_rows(DataSource(str(file))), tokenizer, PromptSettings(400), "file")
    assert prompts[0]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
    ]
    assert prompts["answer"][:] == [2, None]
    assert prompts["level"][:] == [None, {"grade": 1}]
    text = tokenizer.apply_chat_template(prompts[0]["prompt"], add_generation_prompt=True, tokenize=False)
    assert report.sources[0].tokens_read > len(tokenizer(text).input_ids)


def test_long_questions_are_left_out_and_told(tokenizer, capsys):
    rows = [{"prompt": "1+", "answer": "1"}, {"prompt": "1+1+", "answer": "2"}]
    lengths = [len(tokenizer(row["prompt"]).input_ids) for row in rows]
    prompts, report = prepared(rows, tokenizer, max_length=lengths[0], prompt_format="text")
    assert prompts["answer"][:] == ["1"]
    assert (report.sources[0].documents, report.sources[0].documents_dropped) == (2, 1)
    assert (report.sources[0].tokens_read, report.sources[0].tokens_dropped) == (sum(lengths), lengths[1])
    assert f"1 of 2 questions left out: longer than {lengths[0]} tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="none of 2 questions has at most `max_prompt_length` 1 tokens"):
        prepared(rows, tokenizer, max_length=1, prompt_format="text")


def test_a_column_that_no_reward_function_gets_is_told(tokenizer, capsys):
    prompts, _ = prepared([{"prompt": "1+", "completion": "1", "answer": "1"}], tokenizer)
    assert prompts["answer"][:] == ["1"]
    told = capsys.readouterr().out
    assert "no reward function gets the column `completion`, a name of TRL's: rename it if one needs it" in told
    assert "answer" not in told


QUESTION = [{"role": "user", "content": "1+1?"}]


@pytest.mark.parametrize(
    ("row", "fields", "sentence"),
    [
        ({"text": "1"}, {}, "questions, row 1: the row needs a question in `prompt`; it has text"),
        ({"prompt": None}, {}, "the row needs a question in `prompt`"),
        ({"prompt": ""}, {}, "`prompt` is empty"),
        ({"prompt": 3}, {}, "`prompt` must be a list of messages, got 3"),
        ({"prompt": []}, {}, "`prompt` is empty, it must hold at least one message"),
        ({"prompt": [*QUESTION, {"role": "assistant", "content": "2"}]}, {}, "ends with an answer of the assistant"),
        ({"prompt": QUESTION}, {"prompt_format": "text"}, "`prompt` must hold text with `prompt_format='text'`"),
        ({"prompt": "a", "question": "b"}, {"prompt_field": "question"}, "has the columns `question` and `prompt`"),
        (
            {"prompt": "a", "image": "b"},
            {},
            "the column `image` has a name that TRL uses for something else: rename it",
        ),
        ({"prompt": "a", "images": None}, {}, "the column `images` has a name that TRL uses"),
        ({"prompt": "a", "completions": "b"}, {}, "the column `completions` has a name that TRL uses"),
    ],
)
def test_rows_that_ask_nothing_are_refused(tokenizer, row, fields, sentence):
    with pytest.raises(ValueError, match="row 1") as refused:
        prepared([row], tokenizer, **fields)
    assert sentence in str(refused.value)


def test_a_template_that_refuses_a_row_and_columns_of_several_types_are_named(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(ValueError, match="questions, row 1: the chat template refuses the row: no system"):
        prepared([{"prompt": "a"}], tokenizer)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": "1"}\n')
    with pytest.raises(ValueError, match="file: the column `answer` has values of several types"):
        prepare_prompts(load_rows(DataSource(str(file))), tokenizer, PromptSettings(9, prompt_format="text"), "file")


def test_a_whole_number_that_no_column_holds_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a", "answer": 2**70}) + "\n")
    with pytest.raises(ValueError, match="`answer` has a whole number of more than 64 bits: write it as text"):
        prepare_prompts(
            load_rows(DataSource(str(file))), byte_tokenizer(), PromptSettings(9, "prompt", "text"), "file"
        )


def test_sums_are_right_and_none_is_in_both_splits():
    splits = sums_of_digits()
    rows = [row for split in splits.values() for row in split]
    assert len({row["prompt"] for row in rows}) == len(rows) == 55
    for row in rows:
        one, two = row["prompt"].removesuffix("=").split("+")
        assert str(int(one) + int(two)) == row["answer"]
        assert len(row["answer"]) == 1
    assert len(splits["heldout"]) == 11
