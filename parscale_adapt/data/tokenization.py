"""From documents to token ids: no template, and exactly one end token per document."""

from __future__ import annotations

from collections.abc import Iterator

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase


# Large enough for the tokenizer's own threads, small enough that a stream of long documents fits in memory.
_DOCUMENTS_PER_CALL = 64


def encode_documents(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenise documents, each closed by one end token.

    The text is text: the spelling of a special token inside it (``<|im_start|>`` in a source file) becomes ordinary
    tokens. Only an end token's spelling that closes the document is read as the end token, so that a document that
    already carries it does not get two. What the tokenizer itself puts in front (BOS) stays, once.

    Raises:
        ValueError: the tokenizer has no end token.
    """
    end_token, end_token_id = end_token_of(tokenizer)
    adds_end_token = _encode(["a"], tokenizer)[0][-1] == end_token_id
    encoded = _encode([text.removesuffix(end_token) for text in texts], tokenizer)
    if adds_end_token:
        return encoded
    return [[*ids, end_token_id] for ids in encoded]


def end_token_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """Return the end token and its id; ValueError if the tokenizer has none."""
    if tokenizer.eos_token is None or tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {type(tokenizer).__name__} has no end token, so nothing would end: set `eos_token` to one of its "
            "tokens (--eos_token)."
        )
    return str(tokenizer.eos_token), int(tokenizer.eos_token_id)


def iterate_encoded(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, label: str = "dataset"
) -> Iterator[list[int]]:
    """Yield the token ids of each document of the column ``text``, lazily and in order.

    Raises:
        TypeError: a document is not a string; `label` and its number are named.
    """
    num_seen = 0
    # `iter` reads the whole dataset in every process; `for` would leave out shards inside a DataLoader worker.
    for batch in dataset.iter(batch_size=_DOCUMENTS_PER_CALL):
        texts = batch["text"]
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                found = "null" if text is None else type(text).__name__
                raise TypeError(f"{label}, row {num_seen + index + 1}: the field 'text' must hold text, got {found}.")
        yield from encode_documents(texts, tokenizer)
        num_seen += len(texts)


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoding = tokenizer(
        texts,
        add_special_tokens=True,
        split_special_tokens=True,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoding["input_ids"]
