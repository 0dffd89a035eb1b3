"""An output folder belongs to one run: nothing of another run is overwritten, and resuming goes on with the same."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


RUN_FILE = "run.json"
SAVE_RECORD = "verified_save.json"
METRICS_FILE = "metrics.json"


class RunFolder:
    """The output folder of a run, and what makes the run what it is.

    Args:
        path: the folder.
        identity: JSON-able settings that decide the run's numbers.
    """

    def __init__(self, path: str, identity: dict[str, Any]):
        self.path = Path(path)
        self.identity = json.loads(json.dumps(identity, default=str))

    def open(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Claim the folder, and find the checkpoint to go on from.

        Returns:
            The checkpoint's path, or None to start anew. "true" means the last checkpoint whose save was verified.

        Raises:
            ValueError: the folder holds another run, or this run's checkpoints although no resume was asked for, or
                there is nothing to resume from.
        """
        run_file = self.path / RUN_FILE
        if run_file.is_file():
            if self._holds_training():
                self._check_same_run(json.loads(run_file.read_text()))
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"{self.path} is not empty and holds no run of a recipe; choose another `output_dir`.")
        checkpoint = self._checkpoint(resume_from_checkpoint)
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(run_file, json.dumps(self.identity, indent=2, sort_keys=True))
        return checkpoint

    def _holds_training(self) -> bool:
        return (self.path / METRICS_FILE).is_file() or any(self.path.glob("checkpoint-*"))

    def _check_same_run(self, stored: dict[str, Any]) -> None:
        there, here = dict(_flat(stored)), dict(_flat(self.identity))
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                raise ValueError(
                    f"{self.path} holds a different run: `{key}` is {there.get(key)!r} there and {here.get(key)!r} "
                    "here. Choose another `output_dir`, or the same settings to resume."
                )

    def _checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        checkpoints = sorted(self.path.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[-1]))
        complete = [folder for folder in checkpoints if (folder / SAVE_RECORD).is_file()]
        wanted = str(resume_from_checkpoint or "false")
        if wanted.lower() == "false":
            found = complete[-1].name if complete else METRICS_FILE
            if (self.path / found).exists():
                raise ValueError(
                    f"{self.path} already holds this run ({found}); pass `--resume_from_checkpoint true` to go on, or "
                    "choose another `output_dir`."
                )
            return None
        if wanted.lower() == "true":
            if not complete:
                raise ValueError(f"{self.path} holds no complete checkpoint to resume from; start without resuming.")
            return str(complete[-1])
        if not (Path(wanted) / SAVE_RECORD).is_file():
            raise ValueError(f"{wanted} is no complete checkpoint: it has no {SAVE_RECORD}, which is written last.")
        return wanted


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"streams": {"num_streams": 2}}` as `("streams.num_streams", 2)`."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
