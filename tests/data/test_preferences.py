"""Preference pairs as token ids: what is shared, what is left out, and what the embedded ones are."""

import pytest
from datasets import Dataset
from support.tiny_tokenizers import byte_tokenizer

from parscale_adapt.data import (
    PreferenceSettings,
    prepare_preferences,
    set_chat_template,
    stdlib_preference_pairs,
    with_questions,
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer, None)
    return tokenizer


def prepared(rows, tokenizer, max_length=None, **fields):
    settings = PreferenceSettings(max_length, end_token_ids=frozenset({tokenizer.eos_token_id}), **fields)
    return prepare_preferences(Dataset.from_list(rows), tokenizer, settings, "pairs")


def text_of(ids, tokenizer):
    return tokenizer.decode(ids)


ROW = {"prompt": "What is it?", "chosen": "It is this.", "rejected": "It is that one."}


def test_both_answers_follow_the_question_as_the_chat_template_shows_it(tokenizer):
    pairs, report = prepared([ROW], tokenizer)
    (pair,) = pairs
    question = text_of(pair["prompt_ids"], tokenizer)
    assert question.endswith("assistant\n")
    assert "What is it?" in question
    end = tokenizer.eos_token
    assert text_of(pair["chosen_ids"], tokenizer) == f"It is this.{end}\n"
    assert text_of(pair["rejected_ids"], tokenizer) == f"It is that one.{end}\n"
    (whole,) = with_questions(pairs)
    assert whole == {
        "chosen_ids": pair["prompt_ids"] + pair["chosen_ids"],
        "rejected_ids": pair["prompt_ids"] + pair["rejected_ids"],
    }
    counts = report.sources[0]
    assert counts.tokens_trained == len(pair["chosen_ids"]) + len(pair["rejected_ids"])
    assert counts.tokens_read == counts.tokens_trained + 2 * len(pair["prompt_ids"])


def test_whole_conversations_and_a_question_in_a_column_are_the_same_pair(tokenizer):
    question = [{"role": "user", "content": ROW["prompt"]}]
    sides = {side: [{"role": "assistant", "content": ROW[side]}] for side in ("chosen", "rejected")}
    expected = prepared([ROW], tokenizer)[0][0]
    whole = {side: question + answer for side, answer in sides.items()}
    assert prepared([whole], tokenizer)[0][0] == expected
    assert prepared([{"prompt": question, **sides}], tokenizer)[0][0] == expected
    assert prepared([{"prompt": ROW["prompt"], **whole}], tokenizer)[0][0] == expected  # as UltraFeedback has it


def test_columns_of_other_names_are_read(tokenizer):
    renamed = {"q": ROW["prompt"], "good": ROW["chosen"], "bad": ROW["rejected"]}
    fields = {"prompt_field": "q", "chosen_field": "good", "rejected_field": "bad"}
    assert prepared([renamed], tokenizer, **fields)[0][0] == prepared([ROW], tokenizer)[0][0]


def test_pairs_that_are_too_long_are_left_out_and_told(tokenizer, capsys):
    long = {**ROW, "rejected": "word " * 200}
    length = max(len(ids) for ids in with_questions(prepared([ROW], tokenizer)[0])[0].values())
    pairs, report = prepared([long, ROW], tokenizer, max_length=length)
    assert len(pairs) == 1
    assert report.sources[0].documents_dropped == 1
    assert f"1 of 2 pairs left out: longer than {length} tokens" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(ValueError, match=f"none of 1 pairs has at most `max_length` {length - 1} tokens"):
        prepared([ROW], tokenizer, max_length=length - 1)


def test_the_embedded_wrong_answers_are_right_words_in_a_wrong_order():
    pairs = stdlib_preference_pairs()
    assert len(pairs["train"]) > 1000
    assert len(pairs["heldout"]) >= 64
    for pair in pairs["heldout"]:
        assert sorted(pair["chosen"].split()) == sorted(pair["rejected"].split())
        assert pair["chosen"] != pair["rejected"]
    assert not set(pairs["train"]["prompt"]) & set(pairs["heldout"]["prompt"])


def test_columns_that_are_not_read_are_told(tokenizer, capsys):
    prepared([{**ROW, "margin": 0.5, "source": None}, {**ROW, "margin": None, "source": None}], tokenizer)
    assert "pairs: not read, and not trained on: margin." in capsys.readouterr().out.replace("\n", " ")
