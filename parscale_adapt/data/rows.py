"""The rows of each source, epoch after epoch, and their interleaving by shares of trained tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from .packing import PACKED_FEATURES, PackedRow, iterate_packed_rows
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
            raise ValueError(f"{self.name} has no column 'text'; its columns are {', '.join(columns)}")
        if isinstance(self.dataset, Dataset) and len(self.dataset) == 0:
            raise ValueError(f"{self.name} is empty")


@dataclass(frozen=True)
class RowSettings:
    """How rows are made; see `build_train_dataset`."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    seed: int
    shuffle_buffer_size: int
    drop_partial_rows: bool


@dataclass(frozen=True)
class SourceRows:
    """The packed rows of one source, epoch after epoch."""

    index: int
    source: LoadedSource
    settings: RowSettings
    report: TokenReport

    def epoch(self, epoch: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of one epoch (`TRAINING_FEATURES`), its documents in an order of its own.

        Raises:
            ValueError: the whole source holds nothing to train on.
        """
        settings = self.settings
        rows = iterate_packed_rows(
            self._documents(epoch), settings.tokenizer, settings.max_length, label=self.source.name
        )
        num_tokens_trained = 0
        for row, is_last in _mark_last(self._without_partial(rows)):
            num_tokens_trained += row.num_tokens_trained
            yield {**row.to_dict(), "source_index": self.index, "ends_epoch": is_last}
        if num_tokens_trained == 0:
            raise ValueError(
                f"{self.source.name} has nothing to train on: its documents are empty, or all of it fits in less than "
                f"one row of {settings.max_length} tokens and drop_partial_rows is set"
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
    num_epochs: int | None
    max_rows: int | None
    report: TokenReport

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield rows (`TRAINING_FEATURES`) until each source was used `num_epochs` times, or `max_rows` came."""
        self.report.reset()
        for row in islice(self._interleaved(), self.max_rows):
            self.report.add_row(row)
            yield row

    def _interleaved(self) -> Iterator[dict[str, Any]]:
        iterators = [stream.forever() for stream in self.streams]
        row_size = self.streams[0].settings.max_length
        num_trained = [0] * len(iterators)
        num_epochs_done = [0] * len(iterators)
        while self.num_epochs is None or min(num_epochs_done) < self.num_epochs:
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
