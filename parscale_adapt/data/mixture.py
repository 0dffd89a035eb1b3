"""Training data from one or more sources: packed rows, mixed by shares of trained tokens, the same on every rank.

A weighted mixture always takes its next row from the source that is furthest behind its share. Everything is a
function of the sources and the seed alone, so a run that is resumed by skipping the first batches (as transformers'
Trainer does) sees the rows it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, count
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from .packing import rows_to_dataset
from .report import TokenReport
from .rows import TRAINING_FEATURES, LoadedSource, MixtureSettings, RowStream, SourceRows, derive_seed
from .sources import TextSource, load_source
from .tokenization import end_token_of


def build_train_dataset(
    sources: Sequence[TextSource | LoadedSource], tokenizer: PreTrainedTokenizerBase, settings: MixtureSettings
) -> tuple[Dataset | IterableDataset, TokenReport]:
    """Build the rows of a training run.

    With weights, rows are interleaved so that each source's share of the trained tokens follows its weight, a source
    that runs out starts again in a new order, and an epoch ends when every source was used completely. Without, the
    rows of all sources are put together and shuffled.

    Args:
        sources: where the text comes from; all with a weight or none.
        tokenizer: needs an end token.
        settings: how rows are made, and how many.

    Returns:
        The dataset, in memory (about 4 bytes per token), or an `IterableDataset` if a source streams; and its report,
        complete for the former, and for the latter counting the rows handed out since iteration last began.

    Raises:
        ValueError: no source, mixed or missing weights, or what `load_source` says.
    """
    end_token_of(tokenizer)
    shares = _normalised_shares(sources)
    loaded = [_open(source) for source in sources]
    report = TokenReport([source.name for source in loaded], shares)
    streams = [SourceRows(index, source, tokenizer, settings, report) for index, source in enumerate(loaded)]
    if any(isinstance(source.dataset, IterableDataset) for source in loaded):
        _check_stream_weights(loaded, shares)
        return _as_stream(RowStream(streams, shares or [1.0], settings, report)), report
    if settings.num_epochs is None and settings.max_rows is None:
        settings = replace(settings, num_epochs=1)
    if shares is None:
        return _shuffled_rows(streams, settings, report), report
    return rows_to_dataset(RowStream(streams, shares, settings, report), TRAINING_FEATURES), report


def _open(source: TextSource | LoadedSource) -> LoadedSource:
    if isinstance(source, LoadedSource):
        return source
    return LoadedSource(source.label, load_source(source), source.weight)


def _normalised_shares(sources: Sequence[TextSource | LoadedSource]) -> list[float] | None:
    if not sources:
        raise ValueError("No data source was given: name at least one.")
    weights = [source.weight for source in sources]
    given = [weight for weight in weights if weight is not None]
    if not given:
        return None
    if len(given) < len(weights):
        raise ValueError(f"`weight` must be given for every source or for none, got {weights}.")
    return [weight / sum(given) for weight in given]


def _check_stream_weights(loaded: Sequence[LoadedSource], shares: list[float] | None) -> None:
    if shares is None and len(loaded) > 1:
        names = ", ".join(source.name for source in loaded)
        raise ValueError(
            f"Several sources of which one streams ({names}) must have a `weight` each: rows of a stream can't be shuffled "
            "among the others', so training would see one source after the other."
        )


def _as_stream(rows: RowStream) -> IterableDataset:
    return IterableDataset.from_generator(_iterate_rows, features=TRAINING_FEATURES, gen_kwargs={"rows": rows})


def _iterate_rows(rows: RowStream) -> Iterator[dict[str, Any]]:
    yield from rows


def _shuffled_rows(streams: Sequence[SourceRows], settings: MixtureSettings, report: TokenReport) -> Dataset:
    epochs: list[Dataset] = []
    max_rows = settings.max_rows
    for epoch in count() if settings.num_epochs is None else range(settings.num_epochs):
        rows = rows_to_dataset(chain.from_iterable(stream.epoch(epoch) for stream in streams), TRAINING_FEATURES)
        epochs.append(_shuffle_rows(rows, derive_seed(settings.seed, len(streams), epoch)))
        if max_rows is not None and sum(len(rows) for rows in epochs) >= max_rows:
            break
    dataset = concatenate_datasets(epochs)
    if max_rows is not None:
        dataset = dataset.select(range(min(max_rows, len(dataset))), keep_in_memory=True)
    for row in dataset.remove_columns(["input_ids", "seq_lengths"]):
        report.add_row(row)
    return dataset


def _shuffle_rows(rows: Dataset, seed: int) -> Dataset:
    order = np.random.default_rng(seed).permutation(len(rows))
    source_of_row = np.asarray(rows["source_index"][:])
    # A source is used up with whichever of its rows now comes last.
    last_row = {source_of_row[row]: row for row in order}
    ends_epoch = np.isin(np.arange(len(rows)), list(last_row.values()))
    rows = rows.remove_columns("ends_epoch").add_column("ends_epoch", ends_epoch.tolist())
    return rows.select(order, keep_in_memory=True)
