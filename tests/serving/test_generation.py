"""Prompts of a conversation, with a chat template and without one."""

import pytest
from support.tiny_tokenizers import byte_tokenizer

from parscale_adapt.data import CHATML
from parscale_adapt.serving.generation import lay_out, plain_text


ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": " two"},
    {"role": "user", "content": "three"},
]


def test_without_a_template_all_but_answers_start_a_line():
    assert plain_text(ASKED) == "Be brief.\none two\nthree"
    assert plain_text(ASKED[1:]) == "one two\nthree"
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(lay_out(tokenizer, ASKED)["input_ids"][0]) == "Be brief.\none two\nthree"


def test_a_template_lays_the_conversation_out():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    text = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    inputs = lay_out(tokenizer, ASKED)
    assert tokenizer.decode(inputs["input_ids"][0]) == text
    assert inputs["attention_mask"].shape == inputs["input_ids"].shape


def test_what_a_template_refuses_is_one_sentence():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match="The chat template of this model refuses the conversation: System role not"):
        lay_out(tokenizer, ASKED)
