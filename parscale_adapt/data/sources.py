"""Where raw text comes from: a hub dataset or local files, always as one column called ``text``."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetsError


FILE_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
_GLOB_CHARACTERS = re.compile(r"[*?\[]")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_OTHER_FILE = re.compile(r"\.(csv|tsv|arrow|feather|pkl|pickle|bin|md|py|xml|html?|ya?ml|gz|zst|xz|bz2|zip|tar|7z)$")


@dataclass(frozen=True)
class TextSource:
    """One source of raw text.

    Args:
        path: a hub dataset (``owner/name``), or a local file, glob or folder of ``.jsonl``, ``.json``, ``.parquet``
            or ``.txt`` files. What exists locally is taken before the hub. A ``.txt`` file is one document.
        name: configuration of a hub dataset.
        split: split to read; local files are all in ``train``.
        text_field: column that holds the text.
        weight: share of the trained tokens of a mixture, relative to the other sources' weights; ``None`` for all
            sources means that they are concatenated.
        streaming: read lazily, without an Arrow copy on disk.
    """

    path: str
    name: str | None = None
    split: str = "train"
    text_field: str = "text"
    weight: float | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"a text source needs a path (hub name, file, glob or folder), got {self.path!r}")
        check_weight(self.weight, self.path)


def check_weight(weight: float | None, label: str) -> None:
    """Raise ValueError unless `weight` is None or a finite number above 0."""
    if weight is None:
        return
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 < weight < float("inf"):
        raise ValueError(f"{label}: a source weight must be a finite number above 0, got {weight!r}")


def load_source(source: TextSource) -> Dataset | IterableDataset:
    """Open a text source.

    Returns:
        A dataset with the single column ``text`` (strings, at least one document); an `IterableDataset` if
        `source.streaming`. A stream is checked on its first document here and on the others when they are read.

    Raises:
        ValueError: no such local path, unknown file extension, nothing in it, unreadable, or no column
            `source.text_field`.
        TypeError: the column holds something else than text.
    """
    files = find_local_files(source.path)
    dataset = _load_hub(source) if files is None else _load_files(source, files)
    if isinstance(dataset, IterableDataset):
        _check_stream(source, dataset)
    else:
        _check_table(source, dataset)
    dataset = dataset.select_columns([source.text_field])
    return dataset if source.text_field == "text" else dataset.rename_column(source.text_field, "text")


def find_local_files(path: str) -> list[str] | None:
    """List the files behind a local path, sorted; None if `path` is the name of a hub dataset.

    Raises:
        ValueError: see `load_source`; also if the files are of several kinds.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        found = sorted(str(file) for file in local.rglob("*") if file.is_file() and file.suffix in FILE_KINDS)
        if not found:
            raise ValueError(f"the folder {path} holds no {_extensions()} file")
    elif local.is_file():
        found = [str(local)]
    elif _GLOB_CHARACTERS.search(path):
        found = sorted(file for file in glob.glob(str(local), recursive=True) if Path(file).is_file())
        if not found:
            raise ValueError(f"no file matches {path}; looked from {Path.cwd()}")
    elif path.startswith(("/", "./", "../", "~")) or local.suffix in FILE_KINDS or _OTHER_FILE.search(path):
        raise ValueError(f"{path} does not exist; looked from {Path.cwd()}")
    elif _HUB_NAME.fullmatch(path):
        return None
    else:
        raise ValueError(f"{path} is neither an existing file or folder nor a hub dataset name (owner/name)")
    _kind_of(path, found)
    return found


def _kind_of(path: str, files: list[str]) -> str:
    unknown = [file for file in files if Path(file).suffix not in FILE_KINDS]
    if unknown:
        raise ValueError(f"{unknown[0]}: unknown extension {Path(unknown[0]).suffix!r}; use {_extensions()}")
    kinds = sorted({FILE_KINDS[Path(file).suffix] for file in files})
    if len(kinds) > 1:
        raise ValueError(f"{path} holds files of several kinds ({', '.join(kinds)}); make each kind its own source")
    return kinds[0]


def _extensions() -> str:
    *first, last = FILE_KINDS
    return f"{', '.join(first)} or {last}"


def _load_files(source: TextSource, files: list[str]) -> Dataset | IterableDataset:
    if source.name is not None:
        raise ValueError(f"{source.path}: name={source.name!r} is a hub configuration and local files have none")
    kind = _kind_of(source.path, files)
    if all(Path(file).stat().st_size == 0 for file in files):
        raise ValueError(f"{source.path} is empty")
    options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
    options["data_files"] = [glob.escape(str(Path(file).resolve())) for file in files]
    return _load(source, kind, **options)


def _load_hub(source: TextSource) -> Dataset | IterableDataset:
    return _load(source, source.path, name=source.name)


def _load(source: TextSource, builder: str, **options: Any) -> Dataset | IterableDataset:
    try:
        return datasets.load_dataset(builder, split=source.split, streaming=source.streaming, **options)
    except (DatasetsError, ValueError, FileNotFoundError) as error:
        raise ValueError(_cannot_read(source, error)) from error


def _cannot_read(source: TextSource, error: Exception) -> str:
    cause = str(error.__cause__ or error).strip().splitlines()
    return f"{source.path} (split {source.split!r}) cannot be read: {cause[0] if cause else type(error).__name__}"


def _check_table(source: TextSource, dataset: Dataset) -> None:
    if len(dataset) == 0:
        raise ValueError(f"{source.path}: the split {source.split!r} is empty")
    _check_field(source, dataset.column_names)
    feature = dataset.features[source.text_field]
    if not isinstance(feature, datasets.Value) or feature.dtype not in ("string", "large_string"):
        raise TypeError(f"{source.path}: the field {source.text_field!r} holds {feature}, not text")
    num_missing = dataset.with_format("arrow")[:][source.text_field].null_count
    if num_missing:
        raise TypeError(
            f"{source.path}: {num_missing} of {len(dataset)} documents have no text (null) in {source.text_field!r}"
        )


def _check_stream(source: TextSource, dataset: IterableDataset) -> None:
    try:
        first = next(iter(dataset), None)
    except (DatasetsError, ValueError, FileNotFoundError) as error:
        raise ValueError(_cannot_read(source, error)) from error
    if first is None:
        raise ValueError(f"{source.path}: the split {source.split!r} is empty")
    _check_field(source, list(first))
    text = first[source.text_field]
    if not isinstance(text, str):
        raise TypeError(
            f"{source.path}: the field {source.text_field!r} of the first document holds "
            f"{type(text).__name__}, not text"
        )


def _check_field(source: TextSource, columns: list[str]) -> None:
    if source.text_field not in columns:
        raise ValueError(
            f"{source.path} has no field {source.text_field!r}; its fields are {', '.join(sorted(columns))}; "
            "set text_field to one of them"
        )
