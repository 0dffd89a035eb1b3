"""Tokens to pieces of text: whole characters, nothing for special tokens, together the text itself."""

import pytest
from support.tiny_tokenizers import byte_tokenizer

from parscale_adapt.page.pieces import TextPieces


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.mark.parametrize(
    "text",
    ["plain text that is longer than what is kept", "h\u00e9llo \u2713 \U0001f642\U0001f642 end", "  two\n\n lines "],
)
def test_pieces_are_the_text_in_whole_characters(tokenizer, text):
    pieces = TextPieces(tokenizer)
    said = [pieces.add(token) for token in tokenizer(text).input_ids]
    assert "".join(said) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(said)
    assert [piece for piece in said if piece] == list(text)
    assert len(said) == len(text.encode())


def test_special_tokens_add_nothing(tokenizer):
    pieces = TextPieces(tokenizer)
    tokens = [*tokenizer("xy").input_ids, tokenizer.eos_token_id, *tokenizer("c").input_ids]
    assert [pieces.add(token) for token in tokens] == ["x", "y", "", "c"]
