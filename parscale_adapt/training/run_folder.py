"""An output folder belongs to one run: nothing of another run is overwritten, and resuming goes on with the same."""

import json
import os
from pathlib import Path
from typing import Any


RUN_FILE = "run.json"
SAVE_RECORD = "verified_save.json"


class RunFolder:
    """The output folder of a run, and what makes the run what it is.

    Args:
        path: the folder.
        identity: JSON-able settings that decide the run's numbers.
    """

    def __init__(self, path: str, identity: dict[str, Any]):
        self.path = Path(path)
        self.identity = json.loads(json.dumps(identity, default=str))

    def open(self, resume_from_checkpoint: str | None, is_main_process: bool = True) -> str | None:
        """Claim the folder, and find the checkpoint to go on from.

        Returns:
            The checkpoint's path, or None to start anew. "true" means the last checkpoint whose save was verified.

        Raises:
            ValueError: the folder holds another run, or this run's checkpoints although no resume was asked for, or
                there is nothing to resume from.
        """
        run_file = self.path / RUN_FILE
        if run_file.is_file():
            self._check_same_run(json.loads(run_file.read_text()))
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no run of a recipe; choose another `output_dir`.")
        checkpoint = self._checkpoint(resume_from_checkpoint)
        if is_main_process:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(run_file, json.dumps(self.identity, indent=2, sort_keys=True))
        return checkpoint

    def _check_same_run(self, stored: dict[str, Any]) -> None:
        changed = sorted(
            key for key in stored.keys() | self.identity.keys() if stored.get(key) != self.identity.get(key)
        )
        if changed:
            key = changed[0]
            raise ValueError(
                f"{self.path} holds a different run: `{key}` is {stored.get(key)!r} there and "
                f"{self.identity.get(key)!r} here. Choose another `output_dir`, or the same settings to resume."
            )

    def _checkpoint(self, resume_from_checkpoint: str | None) -> str | None:
        checkpoints = sorted(self.path.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[-1]))
        complete = [folder for folder in checkpoints if (folder / SAVE_RECORD).is_file()]
        if resume_from_checkpoint in (None, "", "false", "False"):
            finished = self.path / "metrics.json"
            if complete or finished.is_file():
                raise ValueError(
                    f"{self.path} already holds this run ({finished.name if not complete else complete[-1].name}); "
                    "pass `--resume_from_checkpoint true` to go on, or choose another `output_dir`."
                )
            return None
        if resume_from_checkpoint in ("true", "True"):
            if not complete:
                raise ValueError(f"{self.path} holds no complete checkpoint to resume from; start without resuming.")
            return str(complete[-1])
        if not (Path(resume_from_checkpoint) / SAVE_RECORD).is_file():
            raise ValueError(
                f"{resume_from_checkpoint} is no complete checkpoint: it has no {SAVE_RECORD}, which is written last."
            )
        return resume_from_checkpoint


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
