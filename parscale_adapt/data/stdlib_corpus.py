"""The embedded corpus: the source files of the running Python's standard library, split by file."""

from __future__ import annotations

import functools
import hashlib
import sysconfig
import tokenize
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset, DatasetDict


HELDOUT_FRACTION = 0.05
# Files differ much in length; with this salt 5% of the files are also 5% of the tokens, and only 7% of the held-out
# text stands in lines that the training split has too (Python 3.11).
_SPLIT_SALT = "heldout-24:"
_LEFT_OUT_FOLDERS = {"__pycache__", "dist-packages", "site-packages", "test", "tests", "idle_test", "pydoc_data"}
# Made when Python is built: they hold the machine's paths and differ between two builds of one version.
_LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-")
# Thousands of lines of one shape: generated tables, and the byte-to-character tables of the `encodings` package.
_LEFT_OUT_FILES = {"encodings/aliases.py", "html/entities.py", "re/_casefix.py", "stringprep.py"}
_TABLE_MARKERS = ("decoding_table", "decoding_map")


@functools.cache
def load_stdlib_corpus() -> DatasetDict:
    """Read the standard library's modules, without its tests and generated tables.

    Returns:
        Splits `train` and `heldout` (about 5%) with the columns `text` and `path` (relative, with ``/``), sorted by
        path. A file's split depends on its relative path alone, so it is the same on every machine.
    """
    rows: dict[str, dict[str, list[str]]] = {split: {"text": [], "path": []} for split in ("train", "heldout")}
    for path, text in _read_modules(Path(sysconfig.get_path("stdlib"))):
        split = rows["heldout" if is_heldout(path) else "train"]
        split["text"].append(text)
        split["path"].append(path)
    return DatasetDict({name: Dataset.from_dict(columns) for name, columns in rows.items()})


def is_heldout(path: str) -> bool:
    """Say whether the file with this relative path is in the held-out split."""
    digest = hashlib.sha256(f"{_SPLIT_SALT}{path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELDOUT_FRACTION * 2**64


def corpus_fingerprint(texts: Iterable[str]) -> str:
    """Return a sha256 (64 hex digits) over the texts and their boundaries, in order."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return digest.hexdigest()


def _read_modules(root: Path) -> list[tuple[str, str]]:
    modules = []
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        relative = file.relative_to(root)
        if any(part in _LEFT_OUT_FOLDERS or part.startswith(_LEFT_OUT_PREFIXES) for part in relative.parts):
            continue
        if relative.as_posix() in _LEFT_OUT_FILES:
            continue
        with tokenize.open(file) as stream:
            text = stream.read()
        if text and not any(marker in text for marker in _TABLE_MARKERS):
            modules.append((relative.as_posix(), text))
    return modules
