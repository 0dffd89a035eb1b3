"""Local data files: which lie behind a path, and which of them belong to the split that is asked for."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml


FILE_KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
TEXT_KINDS = ("json", "csv", "text")
COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4")
_GLOB_CHARACTERS = re.compile(r"[*?\[]")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_OTHER_FILE = re.compile(r"\.(feather|pkl|pickle|npy|npz|h5|bin|md|py|xml|html?|ya?ml|xlsx?|xz|zip|tar|tgz|7z)$")
# What libraries write beside the data.
_NOT_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("heldout", "holdout"), "heldout"),
}
_HELDOUT_SPLITS = ("test", "validation", "heldout")
_SHARD = re.compile(r"(?P<split>.+?)[-._]\d{5}-of-\d{5}.*")
_MAX_NAMES = 6


@dataclass(frozen=True)
class LocalFiles:
    """The data files behind a path.

    Args:
        path: as it was given.
        splits: files by split, sorted; one entry under None where the files are not told apart by splits.
        left_out: files that belong to no split, in a folder where others do.
        is_saved: the "files" are folders that `save_to_disk` of the library datasets wrote.
    """

    path: str
    splits: dict[str | None, list[str]]
    left_out: list[str] = field(default_factory=list)
    is_saved: bool = False

    @property
    def files(self) -> list[str]:
        """All files of all splits."""
        return [file for files in self.splits.values() for file in files]

    def of_split(self, split: str) -> list[str]:
        """The files of a split; where files have no splits, all of them are `train`.

        Raises:
            ValueError: there is no such split.
        """
        if None in self.splits:
            if split != "train":
                raise ValueError(
                    f"{self.path} has no split {split!r}: nothing in its names tells files of several splits apart, so all "
                    "of it is 'train'. Leave the split out."
                )
            return self.splits[None]
        if split not in self.splits:
            raise ValueError(
                f"{self.path} has no split {split!r}; by their names its files are of {_names(self.splits)}. Ask for one "
                "of these, or name files."
            )
        return self.splits[split]

    def describe(self, split: str) -> str | None:
        """Which files make up a split and which don't, in a sentence; None where there is nothing to choose."""
        taken = self.of_split(split)
        if len(self.files) == 1 and not self.left_out:
            return None
        others = [
            f"{_short(file, self.path)} ({name})"
            for name, files in self.splits.items()
            for file in files
            if name not in (None, split)
        ]
        others += [f"{_short(file, self.path)} (no split in its name)" for file in self.left_out]
        sentence = f"{self.path}: the split {split!r} is {_listed([_short(file, self.path) for file in taken])}"
        return sentence + (f"; left out: {_listed(others)}." if others else ".")


def find_local(path: str, configuration: str | None = None) -> LocalFiles | None:
    """Find the files behind a path; None if it is the name of a hub dataset.

    Args:
        path: file, glob or folder, also a clone of a hub dataset, or a folder that `save_to_disk` wrote.
        configuration: of a hub dataset, of the README of its clone, or a folder within the clone.

    Raises:
        ValueError: nothing is there, of a kind that is not read, of several kinds, or without that configuration.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return _find_in_folder(path, local, configuration)
    if not local.exists() and not _GLOB_CHARACTERS.search(path):
        if path.startswith(("/", "./", "../", "~")) or _kind(local) or _OTHER_FILE.search(path):
            raise ValueError(f"{path} does not exist; looked from {Path.cwd()}.")
        if _HUB_NAME.fullmatch(path):
            return None
        raise ValueError(f"{path} is neither an existing file or folder nor the name of a hub dataset (owner/name).")
    if configuration is not None:
        raise ValueError(
            f"{path} is no hub dataset, so it has no configuration {configuration!r}: leave the configuration out."
        )
    if local.is_file():
        return LocalFiles(path, {None: _of_one_kind(path, [str(local)])})
    found = sorted(file for file in glob.glob(str(local), recursive=True) if Path(file).is_file())
    if not found:
        raise ValueError(f"No file matches {path}; looked from {Path.cwd()}.")
    files = _by_split(path, Path(os.path.dirname(_GLOB_CHARACTERS.split(str(local))[0])), found)
    # A pattern for the files of one split means all of them, whatever the split is called.
    return files if len(files.splits) > 1 else LocalFiles(path, {None: sorted([*files.files, *files.left_out])})


def find_local_files(path: str) -> list[str] | None:
    """List the files behind a local path, of every split; None if `path` is the name of a hub dataset.

    Raises:
        ValueError: see [`find_local`].
    """
    local = find_local(path)
    return None if local is None else local.files


def default_heldout_split(path: str, configuration: str | None = None) -> str:
    """The split of held-out data where none is named: `test`, else what comes next to it; all of files without splits.

    Raises:
        ValueError: a folder has splits and none of them is for holding out; or see [`find_local`].
    """
    local = find_local(path, configuration)
    if local is None:
        return "test"
    if None in local.splits:
        return "train"
    for split in _HELDOUT_SPLITS:
        if split in local.splits:
            return split
    raise ValueError(
        f"{path} holds the splits {_names(local.splits)} and none to hold out: name the one to measure the held-out "
        "loss on with --heldout_split."
    )


def kind_of(file: str) -> str:
    """The kind of a data file by its name: json, csv, text, parquet or arrow.

    Raises:
        ValueError: it is of no kind that is read.
    """
    kind = _kind(Path(file))
    if kind is None:
        raise ValueError(f"{file} has the unknown extension {Path(file).suffix!r}: use {_extensions()}.")
    return kind


def _kind(file: PurePath) -> str | None:
    if file.suffix.lower() in COMPRESSIONS:
        kind = FILE_KINDS.get(Path(file.stem).suffix.lower())
        return kind if kind in TEXT_KINDS else None
    return FILE_KINDS.get(file.suffix.lower())


def _find_in_folder(path: str, folder: Path, configuration: str | None) -> LocalFiles:
    saved = _saved_dataset(path, folder)
    configured = {} if saved is not None else _configurations(folder)
    if configured:
        return _configured_files(path, folder, configured, configuration)
    if configuration is not None:
        if saved is not None or not (folder / configuration).is_dir():
            raise ValueError(
                f"{path} has no configuration {configuration!r}: neither its README.md nor a folder in it is called so. "
                "Leave the configuration out."
            )
        folder = folder / configuration
    if saved is not None:
        return saved
    found = sorted(str(file) for file in folder.rglob("*") if _is_data(file.relative_to(folder)) and file.is_file())
    if not found:
        raise ValueError(f"The folder {folder} holds no {_extensions()} file.")
    return _by_split(path, folder, found)


def _is_data(relative: PurePath) -> bool:
    is_hidden = any(part.startswith((".", "__")) for part in relative.parts)
    return not is_hidden and _kind(relative) is not None and relative.name not in _NOT_DATA


def _saved_dataset(path: str, folder: Path) -> LocalFiles | None:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(sub.parent.name for sub in folder.glob("*/state.json"))
        return LocalFiles(path, {split: [str(folder / split)] for split in splits}, is_saved=True)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return LocalFiles(path, {None: [str(folder)]}, is_saved=True)
    return None


def _by_split(path: str, root: Path, files: Sequence[str]) -> LocalFiles:
    """Tell files apart by the split that their names, or those of their folders below `root`, speak of."""
    relative = {file: PurePath(file).relative_to(root) for file in files}
    # Documents have titles: a word in one of them says nothing unless there is one in each.
    by_words = all(_kind(name) != "text" or _split_of(name, by_words=True) for name in relative.values())
    splits: dict[str | None, list[str]] = {}
    for file, name in relative.items():
        splits.setdefault(_split_of(name, by_words), []).append(file)
    unnamed = splits.pop(None, [])
    if not splits:
        return LocalFiles(path, {None: _of_one_kind(path, unnamed)})
    if unnamed and not any(split.startswith("train") for split in splits if split):
        splits["train"], unnamed = unnamed, []
    for chosen in splits.values():
        _of_one_kind(path, chosen)
    return LocalFiles(path, splits, unnamed)


def _split_of(name: PurePath, by_words: bool) -> str | None:
    stem = name.name.split(".")[0] if not _SHARD.fullmatch(name.name) else name.name
    shard = _SHARD.fullmatch(stem)
    if shard:
        split = shard["split"]
        if _split_in(split, by_words=True) and re.fullmatch(r"\w+", split):
            return _SPLIT_OF_WORD.get(split.lower(), split)
    if stem.lower() in _SPLIT_OF_WORD:
        return _SPLIT_OF_WORD[stem.lower()]
    folders = (_split_in(folder, by_words) for folder in reversed(name.parts[:-1]))
    return next(filter(None, folders), None) or (_split_in(name.name, by_words) if by_words else None)


def _split_in(text: str, by_words: bool) -> str | None:
    text = re.sub(r"held[-_ ]out", "heldout", text.lower())
    words = re.split(r"[-._ 0-9]+", text) if by_words else [text]
    return next((_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD), None)


def _configurations(folder: Path) -> dict[str, dict[str, Any]]:
    """The configurations that name data files in the front matter of a clone's README.md."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{readme} must begin with YAML between its lines of dashes, got what is none: {reason}."
        ) from error
    configs = metadata.get("configs") if isinstance(metadata, dict) else None
    named = [one for one in configs or [] if isinstance(one, dict) and one.get("data_files")]
    return {str(one.get("config_name", "default")): one for one in named}


def _configured_files(
    path: str, folder: Path, configurations: dict[str, dict[str, Any]], wanted: str | None
) -> LocalFiles:
    if wanted is None:
        standard = [name for name, one in configurations.items() if one.get("default") or name == "default"]
        wanted = next(iter(standard or configurations)) if standard or len(configurations) == 1 else None
    if wanted not in configurations:
        problem = "has several configurations" if wanted is None else f"has no configuration {wanted!r}"
        raise ValueError(f"{path} {problem}; its README.md names {_names(configurations)}. Name one of these.")
    splits: dict[str | None, list[str]] = {}
    for split, patterns in _patterns_by_split(configurations[wanted]["data_files"]):
        files = {str(file) for pattern in patterns for file in folder.glob(str(pattern)) if file.is_file()}
        if not files:
            raise ValueError(
                f"{path} lacks the files of the split {split!r}: its README.md names {', '.join(map(str, patterns))}."
            )
        splits[split] = _of_one_kind(path, sorted(files))
    return LocalFiles(path, splits)


def _patterns_by_split(data_files: Any) -> list[tuple[str, list[Any]]]:
    """The forms that `data_files` has in READMEs: a pattern, a list of patterns or of `split` and `path`, a mapping."""
    if isinstance(data_files, dict):
        pairs = list(data_files.items())
    elif isinstance(data_files, list) and all(isinstance(one, dict) for one in data_files):
        pairs = [(one.get("split", "train"), one.get("path", [])) for one in data_files]
    else:
        pairs = [("train", data_files)]
    return [(str(split), paths if isinstance(paths, list) else [paths]) for split, paths in pairs]


def _of_one_kind(path: str, files: list[str]) -> list[str]:
    kinds = sorted({kind_of(file) for file in files})
    if len(kinds) > 1:
        raise ValueError(
            f"{path} holds files of several kinds ({', '.join(kinds)}): make each kind a source of its own."
        )
    return files


def _extensions() -> str:
    *first, last = FILE_KINDS
    return f"{', '.join(first)} or {last}"


def _short(file: str, path: str) -> str:
    folder = Path(path).expanduser()
    return str(Path(file).relative_to(folder)) if Path(file).is_relative_to(folder) else Path(file).name


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _names(names: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, names)))
