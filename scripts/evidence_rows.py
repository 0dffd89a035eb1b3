"""The table of the evidence runs: one CSV row per experiment and seed, written as it finishes, never mixed."""

from __future__ import annotations

import csv
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import torch

from parscale_adapt import __version__
from parscale_adapt.files import write_atomically


FINISHED, DIVERGED, SKIPPED = "finished", "diverged", "skipped"
COLUMNS = (
    "name", "seed", "status", "stage", "model", "method", "num_streams", "transforms", "start", "smoothing",
    "lora_rank", "diversity_weight", "rate_prefix", "rate_aggregator", "rate_lora", "rate_backbone", "steps", "tokens",
    "num_params", "trained_params", "heldout_loss", "tuning_loss_before", "tuning_loss", "loss_chat", "loss_documentation",
    "loss_gsm8k", "mean_weights", "entropy_share", "rho", "curve", "loss_per_document", "seconds", "peak_memory_gib",
    "data", "machine", "versions",
)  # fmt: skip
# What all rows of one table share; other rows would not be comparable.
SHARED = ("data", "machine", "versions")
_PACKAGES = ("torch", "transformers", "peft")


def shared_columns(data: str, device: torch.device) -> dict[str, str]:
    """The values of [`SHARED`] on this machine."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
    versions = " ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES) + f" parscale_adapt {__version__}"
    return {"data": data, "machine": machine, "versions": versions}


class Table:
    """Rows in a CSV file.

    Args:
        file: read if it is there, written whole with every new row.
        shared: see [`shared_columns`].
        columns: of the file, `status` among them.
        key: the two columns that tell rows apart.

    Raises:
        ValueError: the file has rows with other data, of another machine or of other versions.
    """

    def __init__(
        self,
        file: Path,
        shared: dict[str, str],
        columns: Sequence[str] = COLUMNS,
        key: tuple[str, str] = ("name", "seed"),
    ):
        self.file = file
        self.shared = shared
        self.columns = columns
        self.key = key
        self.rows = read_rows(file, columns) if file.is_file() else []
        for row in self.rows:
            for column in SHARED:
                if row[column] != shared[column]:
                    raise ValueError(
                        f"{file} has rows with {column} {row[column]!r}, and this run's is {shared[column]!r}: they "
                        "can't be compared; name another file by --csv."
                    )

    def add(self, row: dict[str, object]) -> None:
        """Put a row in the place of the one with its key, or at the end."""
        complete = {column: _cell(({**row, **self.shared}).get(column, "")) for column in self.columns}
        keys = [self._key(other) for other in self.rows]
        if self._key(complete) in keys:
            self.rows[keys.index(self._key(complete))] = complete
        else:
            self.rows.append(complete)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, self._write)

    def has(self, *key: object) -> bool:
        """Whether the row of a key has been finished; a diverged one has."""
        wanted = tuple(str(value) for value in key)
        return any(self._key(row) == wanted and row["status"].startswith((FINISHED, DIVERGED)) for row in self.rows)

    def _key(self, row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row[column] for column in self.key)

    def _write(self, file: Path) -> None:
        with open(file, "w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def read_rows(file: Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, str]]:
    """All rows of a table.

    Raises:
        ValueError: a column is missing.
    """
    with open(file, newline="", encoding="utf-8") as opened:
        reader = csv.DictReader(opened)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{file} has no column {missing[0]!r}: it isn't a table of this version; name another.")
        return list(reader)


def best(rows: Iterable[dict[str, str]], names: Iterable[str]) -> str | None:
    """The finished one of `names` with the lowest loss on the tuning documents."""
    wanted = set(names)
    finished = [row for row in rows if row["name"] in wanted and row["status"] == FINISHED]
    return min(finished, key=lambda row: float(row["tuning_loss"]))["name"] if finished else None


def _cell(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
