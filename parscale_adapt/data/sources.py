"""Where data comes from: a hub dataset or local files, as one column called ``text`` or as rows of any shape."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, IterableDataset, Value
from datasets.arrow_reader import ReadInstruction
from datasets.exceptions import DatasetsError

from .local_files import TEXT_KINDS, LocalFiles, find_local, find_local_files, kind_of
from .row_files import UTF8, RowError, check_data_file, iterate_json, iterate_rows, iterate_texts
from .saying import say


__all__ = ["DataSource", "TextSource", "check_weight", "find_local_files", "load_rows", "load_source"]

# Part of the name under which read files are cached; a change of how they are read changes it.
_READER_VERSION = "1"
_MAX_CAUSE = 300
_TEXT = Features({"text": Value("large_string")})
_JSON = Features({"row": Value("large_string"), "place": Value("string")})


@dataclass(frozen=True)
class DataSource:
    """One source of rows.

    Args:
        path: a hub dataset (``owner/name``), or a local file, glob or folder; see docs/data.md for what is read. What
            exists locally is taken before the hub. A ``.txt`` file is one row with the field ``text``.
        name: configuration of a hub dataset, or of its clone.
        split: split to read, also a slice of it, such as ``train[:1000]``. Files and folders whose names speak of splits
            are told apart; all others are in ``train``.
        streaming: read lazily, without an Arrow copy on disk.
        encoding: of local text files.
    """

    path: str
    name: str | None = None
    split: str = "train"
    streaming: bool = False
    encoding: str = UTF8

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"`path` must be the name of a hub dataset, a file, glob or folder, got {self.path!r}.")

    @property
    def base_split(self) -> str:
        """The split without its slice."""
        return self.split.partition("[")[0]

    def local(self) -> LocalFiles | None:
        """The files behind the path; None if it is the name of a hub dataset."""
        return find_local(self.path, self.name)

    def files(self) -> list[str] | None:
        """The files that are read; None for a hub dataset."""
        local = self.local()
        return None if local is None else local.of_split(self.base_split)

    @property
    def label(self) -> str:
        """What the source is called on screen."""
        name = self.path if self.name is None else f"{self.path}/{self.name}"
        return name if self.split == "train" else f"{name} ({self.split})"


@dataclass(frozen=True)
class TextSource(DataSource):
    """One source of raw text.

    Args:
        text_field: column that holds the text.
        weight: share of the trained tokens of a mixture, relative to the other sources' weights; ``None`` for all
            sources means that they are concatenated.
    """

    text_field: str = "text"
    weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight(self.weight, self.path)


def check_weight(weight: float | None, label: str) -> None:
    """Raise ValueError unless `weight` is None or a finite number above 0."""
    if weight is None:
        return
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 < weight < float("inf"):
        raise ValueError(f"The `weight` of {label} must be a finite number above 0, got {weight!r}.")


def load_source(source: TextSource) -> Dataset | IterableDataset:
    """Open a text source.

    Returns:
        A dataset with the single column ``text`` (strings, at least one document); an `IterableDataset` if
        `source.streaming`. A stream is checked on its first document here and on the others when they are read.

    Raises:
        ValueError: no such path, split or configuration, nothing in it, unreadable, or no column `source.text_field`.
        TypeError: the column holds something else than text.
    """
    columns = {"text_field": source.text_field}
    dataset = _open(source, lambda files: _read_texts(source, files, iterate_texts, _TEXT, columns))
    dataset = _checked_stream(source, dataset) if source.streaming else _checked_table(source, dataset)
    return dataset.select_columns(["text"])


def load_rows(source: DataSource) -> Dataset | IterableDataset:
    """Open a source of rows of any shape.

    Returns:
        At least one row. Rows of text files have the columns `row` (JSON) and `place` (where it stands in its file);
        others have columns of their own.

    Raises:
        ValueError: no such path, split or configuration, nothing in it, or unreadable.
    """
    dataset = _open(source, lambda files: _read_texts(source, files, iterate_json, _JSON, {}))
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(_without_rows(source))
    return dataset


def is_json_rows(dataset: Dataset | IterableDataset) -> bool:
    """Whether rows are those of text files, as [`load_rows`] gives them."""
    return dataset.features == _JSON


def _open(
    source: DataSource, read_text_files: Callable[[list[str]], Dataset | IterableDataset]
) -> Dataset | IterableDataset:
    local = source.local()
    if local is None:
        with _reading(source):
            return _load_hub(source)
    if source.streaming and source.split != source.base_split:
        raise ValueError(
            f"{source.path} is streamed, which knows no slices, got `split={source.split!r}`: leave one out."
        )
    files = local.of_split(source.base_split)
    description = local.describe(source.base_split)
    if description is not None:
        say(description)
    with _reading(source):
        return _sliced(_load_files(source, local.is_saved, files, read_text_files), source)


@contextmanager
def _reading(source: DataSource) -> Iterator[None]:
    """Turn what goes wrong in reading into one sentence that names the source.

    The hub's clients and the readers of binary files raise errors of many libraries.

    Raises:
        ValueError: something went wrong.
    """
    try:
        yield
    except RowError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ is not None else error
        if isinstance(cause, RowError):
            raise cause from error
        reason = " ".join(str(cause).split())[:_MAX_CAUSE].rstrip(".") or type(cause).__name__
        raise ValueError(f"{source.path} (split {source.split!r}) can't be read: {reason}.") from error


def _load_hub(source: DataSource) -> Dataset | IterableDataset:
    _refuse_encoding(source, "a hub dataset")
    return datasets.load_dataset(source.path, name=source.name, split=source.split, streaming=source.streaming)


def _load_files(
    source: DataSource,
    is_saved: bool,
    files: list[str],
    read_text_files: Callable[[list[str]], Dataset | IterableDataset],
) -> Dataset | IterableDataset:
    if is_saved:
        _refuse_encoding(source, "a folder of `save_to_disk`")
        dataset = datasets.load_from_disk(files[0])
        return dataset.to_iterable_dataset() if source.streaming else dataset
    kind = kind_of(files[0])
    if kind in TEXT_KINDS:
        if next(iterate_rows(files, source.encoding), None) is None:
            raise RowError(_without_rows(source))
        return read_text_files(files)
    _refuse_encoding(source, f"a {kind} file")
    for file in files:
        check_data_file(file)
    escaped = [glob.escape(str(Path(file).resolve())) for file in files]
    return datasets.load_dataset(kind, data_files=escaped, split="train", streaming=source.streaming)


def _read_texts(
    source: DataSource, files: list[str], generator: Callable[..., Any], features: Features, options: dict[str, Any]
) -> Dataset | IterableDataset:
    arguments = {"files": files, "encoding": source.encoding, **options}
    if source.streaming:
        return IterableDataset.from_generator(
            generator, features=features, gen_kwargs={**arguments, "version": _READER_VERSION}
        )
    stamps = [(stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in map(Path.stat, map(Path, files))]
    version = f"{_READER_VERSION} {stamps}"
    return Dataset.from_generator(generator, features=features, gen_kwargs={**arguments, "version": version})


def _sliced(dataset: Dataset | IterableDataset, source: DataSource) -> Dataset | IterableDataset:
    if source.split == source.base_split:
        return dataset
    (part,) = ReadInstruction.from_spec(source.split).to_absolute({source.base_split: len(dataset)})
    return dataset.select(range(part.from_ or 0, len(dataset) if part.to is None else part.to))


def _refuse_encoding(source: DataSource, what: str) -> None:
    if source.encoding != UTF8:
        raise RowError(
            f"{source.path} is {what}, which has no encoding to choose, got `encoding={source.encoding!r}`: leave it out."
        )


def _without_rows(source: DataSource) -> str:
    return f"{source.path} has no rows in the split {source.split!r}: give data with at least one."


def _checked_table(source: TextSource, dataset: Dataset) -> Dataset:
    if len(dataset) == 0:
        raise ValueError(_without_rows(source))
    if dataset.features == _TEXT:
        return dataset
    _check_field(source, dataset.column_names)
    feature = dataset.features[source.text_field]
    if not isinstance(feature, Value) or feature.dtype not in ("string", "large_string", "string_view"):
        raise TypeError(f"{source.path}: the field {source.text_field!r} must hold text, got {feature}.")
    column = dataset.with_format("arrow")[:][source.text_field]
    if column.null_count:
        first = next(row for row, text in enumerate(column, start=1) if not text.is_valid)
        raise TypeError(
            f"{source.path}, row {first}: the field {source.text_field!r} must hold text, got null "
            f"({column.null_count} of {len(dataset)} rows)."
        )
    return _as_text(source, dataset)


def _checked_stream(source: TextSource, dataset: IterableDataset) -> IterableDataset:
    with _reading(source):
        first = next(iter(dataset), None)
    if first is None:
        raise ValueError(_without_rows(source))
    if dataset.features == _TEXT:
        return dataset
    _check_field(source, list(first))
    text = first[source.text_field]
    if not isinstance(text, str):
        raise TypeError(
            f"{source.path}, row 1: the field {source.text_field!r} must hold text, got {type(text).__name__}."
        )
    return _as_text(source, dataset)


def _as_text(source: TextSource, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    dataset = dataset.select_columns([source.text_field])
    return dataset if source.text_field == "text" else dataset.rename_column(source.text_field, "text")


def _check_field(source: TextSource, columns: list[str]) -> None:
    if source.text_field not in columns:
        raise ValueError(
            f"{source.path} has no field {source.text_field!r}: its fields are {', '.join(sorted(columns))}. Name one of "
            "these with `text_field`."
        )
