"""What data holds, in a few bytes: fingerprints of files, and revisions of hub datasets."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
from huggingface_hub import HfApi

from .sources import DataSource


WHOLE_BELOW = 64 * 2**20
NUM_BLOCKS, BLOCK_SIZE = 64, 2**20
_COMMIT = re.compile(r"[0-9a-f]{40}")


def content_of(source: DataSource) -> str | None:
    """What changes with the content of a source: a fingerprint of its files, or the commit of a hub dataset.

    Returns:
        Hexadecimal digits; None for a hub dataset where neither the hub nor the cache tells.

    Raises:
        ValueError: there is no such path or split.
    """
    files = source.files()
    return hub_commit(source) if files is None else fingerprint_of_files(files)


def fingerprint_of_files(paths: Iterable[str | Path]) -> str:
    """Hash of the names and the content of files, in their order; folders with all that is in them.

    Files below 64 MiB are read whole. Of larger ones, the size and 64 blocks of 1 MiB, spread evenly from the first to
    the last byte, are read, which takes well under a second for any size; a change of the same length between two
    blocks is not seen.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in _all_files(paths):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size < WHOLE_BELOW:
                digest.update(file.read())
                continue
            for block in range(NUM_BLOCKS):
                file.seek((size - BLOCK_SIZE) * block // (NUM_BLOCKS - 1))
                digest.update(file.read(BLOCK_SIZE))
    return digest.hexdigest()


def _all_files(paths: Iterable[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            yield from (below for below in sorted(path.rglob("*")) if below.is_file())
        else:
            yield path


def hub_commit(source: DataSource) -> str | None:
    """The commit of a hub dataset that is read: what the hub says, or without it what was read last; else None."""
    try:
        return HfApi().dataset_info(source.path, timeout=10).sha
    except Exception:  # the hub's client raises errors of several libraries; loading says what is wrong
        folder = Path(datasets.config.HF_DATASETS_CACHE) / source.path.replace("/", "___")
        commits = [path for path in folder.glob("*/*/*") if _COMMIT.fullmatch(path.name)]
        return max(commits, key=os.path.getmtime).name if commits else None
