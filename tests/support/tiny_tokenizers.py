"""Tokenizers of the package's own kind, in no time."""

from transformers import PreTrainedTokenizerFast

from parscale_adapt.data import train_tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows bytes, three special tokens and next to no longer tokens."""
    return train_tokenizer(["abc"] * 3, 261)
