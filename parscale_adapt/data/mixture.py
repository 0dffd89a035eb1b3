"""Training data from one or more sources: packed rows, mixed by shares of trained tokens, the same on every rank.

A weighted mixture always takes its next row from the source that is furthest behind its share. Everything is a
function of the sources and the seed alone, so a run that is resumed by skipping the first batches (as transformers'
Trainer does) sees the rows it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, count
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from .packing import check_max_length, rows_to_dataset
from .report import TokenReport
from .rows import TRAINING_FEATURES, LoadedSource, RowSettings, RowStream, SourceRows, derive_seed
from .sources import TextSource, load_source
from .tokenization import end_token_of


def build_train_dataset(
    sources: Sequence[TextSource | LoadedSource],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    seed: int,
    *,
    num_epochs: int | None = None,
    max_rows: int | None = None,
    shuffle_buffer_size: int = 0,
    drop_partial_rows: bool = False,
) -> tuple[Dataset | IterableDataset, TokenReport]:
    """Build the rows of a training run.

    With weights, rows are interleaved so that each source's share of the trained tokens follows its weight, a source
    that runs out starts again in a new order, and an epoch ends when every source was used completely. Without, the
    rows of all sources are put together and shuffled.

    Args:
        sources: where the text comes from; all with a weight or none.
        tokenizer: needs an end token.
        max_length: tokens per row.
        seed: decides every order.
        num_epochs: epochs to lay out in one dataset. None means one; for a stream it means without end (the Trainer
            needs `max_steps` there, and can only resume exactly within one pass over its dataset).
        max_rows: stop after this many rows, with as many epochs as they take unless `num_epochs` limits them. With
            the number that a run consumes, the report says exactly what is trained.
        shuffle_buffer_size: documents held to shuffle a streaming source, 0 to keep its order. Others are always
            shuffled completely.
        drop_partial_rows: leave out the shorter row that closes each source's epoch (it is counted as dropped).

    Returns:
        The dataset, in memory (about 4 bytes per token), or an `IterableDataset` if a source streams; and its report,
        complete for the former, and for the latter counting the rows handed out since iteration last began.

    Raises:
        ValueError: no source, mixed or missing weights, a number out of range, or what `load_source` says.
    """
    end_token_of(tokenizer)
    check_max_length(max_length)
    _check_count("seed", seed, 0)
    _check_count("num_epochs", num_epochs, 1)
    _check_count("max_rows", max_rows, 1)
    _check_count("shuffle_buffer_size", shuffle_buffer_size, 0)
    shares = _normalised_shares(sources)
    loaded = [_open(source) for source in sources]
    report = TokenReport([source.name for source in loaded], shares)
    settings = RowSettings(tokenizer, max_length, seed, shuffle_buffer_size, drop_partial_rows)
    streams = [SourceRows(index, source, settings, report) for index, source in enumerate(loaded)]
    if any(isinstance(source.dataset, IterableDataset) for source in loaded):
        _check_stream_weights(loaded, shares)
        return _as_stream(RowStream(streams, shares or [1.0], num_epochs, max_rows, report)), report
    if num_epochs is None and max_rows is None:
        num_epochs = 1
    if shares is None:
        return _shuffled_rows(streams, num_epochs, max_rows, seed, report), report
    rows = RowStream(streams, shares, num_epochs, max_rows, report)
    return rows_to_dataset(rows, TRAINING_FEATURES), report


def _open(source: TextSource | LoadedSource) -> LoadedSource:
    if isinstance(source, LoadedSource):
        return source
    name = source.path if source.name is None else f"{source.path}/{source.name}"
    return LoadedSource(name, load_source(source), source.weight)


def _normalised_shares(sources: Sequence[TextSource | LoadedSource]) -> list[float] | None:
    if not sources:
        raise ValueError("no data source was given")
    weights = [source.weight for source in sources]
    given = [weight for weight in weights if weight is not None]
    if not given:
        return None
    if len(given) < len(weights):
        raise ValueError(f"give a weight to every source or to none; the weights are {weights}")
    return [weight / sum(given) for weight in given]


def _check_stream_weights(loaded: Sequence[LoadedSource], shares: list[float] | None) -> None:
    if shares is None and len(loaded) > 1:
        names = ", ".join(source.name for source in loaded)
        raise ValueError(
            f"several sources of which one streams ({names}) need weights: rows of a stream cannot be shuffled among "
            "the others', so training would see one source after the other"
        )


def _check_count(name: str, value: int | None, lowest: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < lowest):
        raise ValueError(f"{name} must be a whole number of at least {lowest}, got {value!r}")


def _as_stream(rows: RowStream) -> IterableDataset:
    return IterableDataset.from_generator(_iterate_rows, features=TRAINING_FEATURES, gen_kwargs={"rows": rows})


def _iterate_rows(rows: RowStream) -> Iterator[dict[str, Any]]:
    yield from rows


def _shuffled_rows(
    streams: Sequence[SourceRows], num_epochs: int | None, max_rows: int | None, seed: int, report: TokenReport
) -> Dataset:
    epochs: list[Dataset] = []
    for epoch in count() if num_epochs is None else range(num_epochs):
        rows = rows_to_dataset(chain.from_iterable(stream.epoch(epoch) for stream in streams), TRAINING_FEATURES)
        epochs.append(_shuffle_rows(rows, derive_seed(seed, len(streams), epoch)))
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
