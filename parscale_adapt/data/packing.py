"""Packing: documents laid end to end in rows of one length, with nothing cut off and no view across a boundary.

A document that does not fit goes on in the next row. Its continuation starts with the last token of the row before,
which is read once more and not trained there: so every token of a document but its first is trained exactly once,
whatever the row length, at the price of one position per cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from .tokenization import end_token_of, iterate_encoded


IGNORED_LABEL = -100
_ROWS_PER_CHUNK = 1024


@dataclass(slots=True)
class PackedRow:
    """One row of packed documents.

    Args:
        input_ids: token ids, `max_length` of them or fewer in the last row.
        seq_lengths: lengths of the segments; they sum to the row's length.
        num_documents: documents that end in this row.
        num_tokens_read: tokens of the row that no earlier row held.
    """

    input_ids: list[int] = field(default_factory=list)
    seq_lengths: list[int] = field(default_factory=list)
    num_documents: int = 0
    num_tokens_read: int = 0

    def append(self, piece: Sequence[int], num_tokens_read: int, ends_document: bool) -> None:
        """Add a segment; `num_tokens_read` of its tokens are new, and it may be the end of its document."""
        self.input_ids.extend(piece)
        self.seq_lengths.append(len(piece))
        self.num_documents += ends_document
        self.num_tokens_read += num_tokens_read

    @property
    def num_tokens_trained(self) -> int:
        """Tokens that are predicted: all but the first of each segment."""
        return len(self.input_ids) - len(self.seq_lengths)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as the columns of `PACKED_FEATURES`."""
        return {
            "input_ids": self.input_ids,
            "seq_lengths": self.seq_lengths,
            "num_documents": self.num_documents,
            "num_tokens_read": self.num_tokens_read,
            "num_tokens_trained": self.num_tokens_trained,
        }


PACKED_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "seq_lengths": List(Value("int32")),
        "num_documents": Value("int32"),
        "num_tokens_read": Value("int32"),
        "num_tokens_trained": Value("int32"),
    }
)


def pack_documents(documents: Iterable[Sequence[int]], max_length: int) -> Iterator[PackedRow]:
    """Lay token lists end to end in rows of `max_length` tokens, lazily.

    Raises:
        ValueError: `max_length` is below 2, or a document has no token.
    """
    check_max_length(max_length)
    row = PackedRow()
    for document in documents:
        if not document:
            raise ValueError("A document has no token: each needs at least its end token.")
        start = num_overlapping = 0
        while start + num_overlapping < len(document):
            piece = document[start : start + max_length - len(row.input_ids)]
            end = start + len(piece)
            row.append(piece, num_tokens_read=len(piece) - num_overlapping, ends_document=end == len(document))
            if len(row.input_ids) == max_length:
                yield row
                row = PackedRow()
            start, num_overlapping = end - 1, 1
    if row.input_ids:
        yield row


def check_max_length(max_length: int) -> None:
    """Raise ValueError unless a row of `max_length` tokens can hold a token and its target."""
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise ValueError(f"`max_length` must be a whole number of at least 2 tokens, got {max_length!r}.")


def iterate_packed_rows(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    label: str = "dataset",
) -> Iterator[PackedRow]:
    """Tokenise and pack the column ``text`` of a dataset in its own order, lazily (see `pack_documents`)."""
    return pack_documents(iterate_encoded(dataset, tokenizer, label), max_length)


def pack_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_rows: int | None = None,
    label: str = "dataset",
) -> Dataset:
    """Pack a dataset in its own order, for instance a held-out split.

    Args:
        dataset: with the column `text`.
        tokenizer: needs an end token.
        max_length: tokens per row.
        max_rows: stop after this many rows.
        label: name of the data, for errors.

    Returns:
        An in-memory dataset with the columns of `PACKED_FEATURES` (4 bytes per token).

    Raises:
        ValueError: the tokenizer has no end token, or there is no token to predict.
    """
    end_token_of(tokenizer)
    rows = islice(iterate_packed_rows(dataset, tokenizer, max_length, label), max_rows)
    packed = rows_to_dataset((row.to_dict() for row in rows), PACKED_FEATURES)
    if not any(packed["num_tokens_trained"]):
        where = "" if max_rows is None else f" in the first {max_rows:,} rows"
        raise ValueError(
            f"{label}: its {len(dataset):,} documents hold no token to predict{where}: give documents that are not empty."
        )
    return packed


def rows_to_dataset(rows: Iterable[dict[str, Any]], features: Features) -> Dataset:
    """Gather rows into an in-memory Arrow dataset; no cache file is written or read."""
    chunks: list[Dataset] = []
    columns: dict[str, list[Any]] = {name: [] for name in features}
    sentinel: list[dict[str, Any] | None] = [None]
    for row in chain(rows, sentinel):
        if row is not None:
            for name, values in columns.items():
                values.append(row[name])
        if row is None or len(columns["input_ids"]) == _ROWS_PER_CHUNK:
            chunks.append(Dataset.from_dict(columns, features=features))
            columns = {name: [] for name in features}
    return concatenate_datasets([chunk for chunk in chunks if len(chunk)] or chunks)


@dataclass(frozen=True)
class PackedCollator:
    """Batch packed rows for a causal language model.

    Positions restart at 0 in each segment and no attention mask is given: transformers reads the boundaries off the
    positions and keeps each token within its own segment. It does so only without a cache, hence `use_cache` is part
    of the batch. If no row has a boundary, the positions count up plainly and the model takes its causal path without
    a mask. A row shorter than the longest is filled up with a segment of its own, which no other token sees and which
    is not trained.

    Args:
        pad_token_id: id put in filled-up positions; any valid id will do.
        flatten: lay the rows end to end in a single one, without filling up. Flash attention needs it: there
            transformers looks for boundaries only if the batch has one row.
    """

    pad_token_id: int
    flatten: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.pad_token_id, bool) or not isinstance(self.pad_token_id, int):
            raise TypeError(
                f"`pad_token_id` must be an integer, got {self.pad_token_id!r}: a tokenizer without a padding token can lend "
                "its `eos_token_id`."
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows with `input_ids` and `seq_lengths`.

        Returns:
            `input_ids`, `labels` and `position_ids`, each int64 `[num_rows, longest row]` (or `[1, all tokens]`), and
            `use_cache`, False. The label of a segment's first token is -100, since the token before it belongs to
            another document.

        Raises:
            ValueError: the segments of a row do not sum to its length.
        """
        lines = [(list(row["input_ids"]), check_seq_lengths(row)) for row in rows]
        if self.flatten:
            lines = [(list(chain.from_iterable(ids for ids, _ in lines)), [n for _, sizes in lines for n in sizes])]
        width = max(len(ids) for ids, _ in lines)
        input_ids = torch.full((len(lines), width), self.pad_token_id, dtype=torch.long)
        labels = torch.full((len(lines), width), IGNORED_LABEL, dtype=torch.long)
        position_ids = torch.empty((len(lines), width), dtype=torch.long)
        for index, (ids, sizes) in enumerate(lines):
            input_ids[index, : len(ids)] = labels[index, : len(ids)] = torch.tensor(ids)
            position_ids[index] = torch.cat([torch.arange(size) for size in [*sizes, width - len(ids)]])
        labels[position_ids == 0] = IGNORED_LABEL
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "use_cache": False}


def check_seq_lengths(row: Mapping[str, Any]) -> list[int]:
    """Return the segment lengths of a packed row; ValueError if they are missing or do not sum to its length."""
    if "seq_lengths" not in row:
        raise ValueError(f"A packed row must have the columns `input_ids` and `seq_lengths`, got {', '.join(row)}.")
    seq_lengths = [int(size) for size in row["seq_lengths"]]
    length = len(row["input_ids"])
    if sum(seq_lengths) != length or min(seq_lengths, default=0) < 1:
        raise ValueError(f"The segments of a packed row of {length} tokens must sum to it, got {seq_lengths}.")
    return seq_lengths
