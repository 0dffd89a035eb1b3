"""The rows of each source, epoch after epoch, and their interleaving by shares of trained tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from .packing import PACKED_FEATURES, PackedRow, check_max_length, iterate_packed_rows
from .report import TokenReport
from .sources import check_weight


TRAINING_FEATURES = Features({**PACKED_FEATURES, "source_index": Value("int32"), "ends_epoch": Value("bool")})


@dataclass(frozen=True)
class LoadedSource:
    """A source that is already a dataset with the column ``text``; `weight` as in `TextSource`."""

    name: str
    dataset: Dataset | IterableDataset
    weight: float | None = None

    def __post_init__(self) -> None:
        check_weight(self.weight, self.name)
        columns = self.dataset.column_names
        if columns is not None and "text" not in columns:
            raise ValueError(f"{self.name} must have a column `text`, got {', '.join(columns)}.")
        if isinstance(self.dataset, Dataset) and len(self.dataset) == 0:
            raise ValueError(f"{self.name} is empty: give data with at least one row.")


@dataclass(frozen=True)
class MixtureSettings:
    """How the rows of a training run are made.

    Args:
        max_length: tokens per row.
        seed: decides every order.
        num_epochs: epochs to lay out in one dataset. None means one; for a stream it means without end (the Trainer
            needs `max_steps` there, and can only resume exactly within one pass over its dataset).
        max_rows: stop after this many rows, with as many epochs as they take unless `num_epochs` limits them. With
            the number that a run consumes, the report says exactly what is trained.
        shuffle_buffer_size: documents held to shuffle a streaming source, 0 to keep its order. Others are always
            shuffled completely.
        drop_partial_rows: leave out the shorter row that closes each source's epoch (it is counted as dropped).
    """

    max_length: int
    seed: int
    num_epochs: int | None = None
    max_rows: int | None = None
    shuffle_buffer_size: int = 0
    drop_partial_rows: bool = False

    def __post_init__(self) -> None:
        check_max_length(self.max_length)
        for name, lowest in (("seed", 0), ("num_epochs", 1), ("max_rows", 1), ("shuffle_buffer_size", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < lowest):
                raise ValueError(f"`{name}` must be a whole number of at least {lowest}, got {value!r}.")


@dataclass(frozen=True)
class SourceRows:
    """The packed rows of one source, epoch after epoch."""

    index: int
    source: LoadedSource
    tokenizer: PreTrainedTokenizerBase
    settings: MixtureSettings
    report: TokenReport

    def epoch(self, epoch: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of one epoch (`TRAINING_FEATURES`), its documents in an order of its own.

        Raises:
            ValueError: the whole source holds nothing to train on.
        """
        settings = self.settings
        rows = iterate_packed_rows(self._documents(epoch), self.tokenizer, settings.max_length, label=self.source.name)
        num_tokens_trained = 0
        for row, is_last in _mark_last(self._without_partial(rows)):
            num_tokens_trained += row.num_tokens_trained
            yield {**row.to_dict(), "source_index": self.index, "ends_epoch": is_last}
        if num_tokens_trained == 0:
            raise ValueError(
                f"{self.source.name} has nothing to train on: its documents are empty, or all of it fits in less than "
                f"one row of {settings.max_length} tokens and `drop_partial_rows` is set."
            )

    def forever(self) -> Iterator[dict[str, Any]]:
        """Yield epoch after epoch without end."""
        return chain.from_iterable(self.epoch(epoch) for epoch in count())

    def _documents(self, epoch: int) -> Dataset | IterableDataset:
        seed = derive_seed(self.settings.seed, self.index, epoch)
        dataset = self.source.dataset
        if isinstance(dataset, Dataset):
            return dataset.shuffle(seed=seed, keep_in_memory=True)
        if self.settings.shuffle_buffer_size == 0:
            return dataset
        return dataset.shuffle(seed=seed, buffer_size=self.settings.shuffle_buffer_size)

    def _without_partial(self, rows: Iterable[PackedRow]) -> Iterator[PackedRow]:
        for row in rows:
            if self.settings.drop_partial_rows and len(row.input_ids) < self.settings.max_length:
                self.report.add_dropped(self.index, row.num_documents, row.num_tokens_read)
            else:
                yield row


@dataclass(frozen=True)
class RowStream:
    """Rows of several sources, interleaved by largest deficit; iterating starts from the first row again."""

    streams: Sequence[SourceRows]
    shares: Sequence[float]
    settings: MixtureSettings
    report: TokenReport

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield rows (`TRAINING_FEATURES`) until each source was used `num_epochs` times, or `max_rows` came."""
        self.report.reset()
        for row in islice(self._interleaved(), self.settings.max_rows):
            self.report.add_row(row)
            yield row

    def _interleaved(self) -> Iterator[dict[str, Any]]:
        iterators = [stream.forever() for stream in self.streams]
        num_epochs, row_size = self.settings.num_epochs, self.settings.max_length
        num_trained = [0] * len(iterators)
        num_epochs_done = [0] * len(iterators)
        while num_epochs is None or min(num_epochs_done) < num_epochs:
            target = sum(num_trained) + row_size
            deficits = [share * target - done for share, done in zip(self.shares, num_trained)]
            index = deficits.index(max(deficits))
            row = next(iterators[index])
            num_trained[index] += row["num_tokens_trained"]
            num_epochs_done[index] += row["ends_epoch"]
            yield row


def derive_seed(seed: int, *path: int) -> int:
    """Return a seed that depends on `seed` and on every number of `path`, the same on every machine."""
    return int(np.random.SeedSequence([seed, *path]).generate_state(1)[0])


def _mark_last(rows: Iterable[PackedRow]) -> Iterator[tuple[PackedRow, bool]]:
    previous: PackedRow | None = None
    for row in rows:
        if previous is not None:
            yield previous, False
        previous = row
    if previous is not None:
        yield previous, True
