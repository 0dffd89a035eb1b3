"""An output folder belongs to one run: nothing of another run is overwritten, and resuming goes on with the same."""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import lock_until_the_end, write_text


RUN_FILE = "run.json"
LOCK_FILE = ".lock"
SAVE_RECORD = "verified_save.json"
METRICS_FILE = "metrics.json"
_FREE_TO_CHANGE = "logging, saving, evaluation, the hub and data loader workers may change, all else may not"
_SECTIONS = ("streams", "data_settings", "content")  # settings of their own; all other mappings are values


def verified_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in an output folder whose saves were read back and compared, by step."""
    return [path for path in _checkpoints(folder) if (path / SAVE_RECORD).is_file()]


def _checkpoints(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]))


def last_verified_checkpoint(folder: str | Path) -> Path:
    """The checkpoint to go on from.

    Raises:
        ValueError: the folder holds none.
    """
    complete = verified_checkpoints(folder)
    if not complete:
        raise ValueError(f"{folder} holds no complete checkpoint to resume from; start without resuming.")
    return complete[-1]


def drop_old_checkpoints(newest: Path, limit: int, best: str | None = None) -> None:
    """Remove checkpoints beside the one that was just saved: the incomplete ones first, then those of lower steps.

    By step and not by time, since clocks jump.

    Args:
        newest: stays.
        limit: how many stay in all.
        best: stays too, if there is one.
    """
    kept = {newest} if best is None else {newest, newest.with_name(Path(best).name)}
    complete = verified_checkpoints(newest.parent)
    others = [path for path in _checkpoints(newest.parent) if path not in kept]
    others.sort(key=lambda path: path in complete)  # stable
    for path in others[: max(len(kept) + len(others) - limit, 0)]:
        shutil.rmtree(path, ignore_errors=True)


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
        """Claim the folder until this process ends, and find the checkpoint to go on from.

        Returns:
            The checkpoint's path, or None to start anew. "true" means the last checkpoint whose save was verified.

        Raises:
            ValueError: the folder can't be written, is in use, holds another run, or this run's checkpoints although no
                resume was asked for, or there is nothing to resume from.
        """
        run_file = self.path / RUN_FILE
        if not run_file.is_file() and self.path.exists() and not self._is_empty():
            raise ValueError(f"{self.path} is not empty and holds no run of a recipe; choose another `output_dir`.")
        if not self.path.exists():
            self._checkpoint(resume_from_checkpoint)  # before anything is made
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock_until_the_end(self.path / LOCK_FILE)
        except OSError as error:
            raise ValueError(
                f"`output_dir` is {self.path}, which can't be written: {error.strerror}; choose another, or make it writable."
            ) from error
        if run_file.is_file() and self._holds_training():
            self._check_same_run(json.loads(run_file.read_text()))
        checkpoint = self._checkpoint(resume_from_checkpoint)
        write_text(run_file, json.dumps(self.identity, indent=2, sort_keys=True))
        return checkpoint

    def _is_empty(self) -> bool:
        return self.path.is_dir() and all(path.name == LOCK_FILE for path in self.path.iterdir())

    def _holds_training(self) -> bool:
        return self._final_save() is not None or any(self.path.glob("checkpoint-*"))

    def _final_save(self) -> str | None:
        """What says that the trained model lies in the folder; it is saved before it is measured."""
        return next((name for name in (METRICS_FILE, SAVE_RECORD) if (self.path / name).is_file()), None)

    def _check_same_run(self, stored: dict[str, Any]) -> None:
        """Compare the settings that both know; versions of this package and of TRL know different ones.

        Raises:
            ValueError: one differs.
        """
        there, here = dict(_by_name(stored)), dict(_by_name(self.identity))
        for name in sorted(there.keys() & here.keys()):
            if there[name] != here[name]:
                raise ValueError(
                    f"{self.path} holds a different run: {_difference(name, there[name], here[name])}. Choose another "
                    f"`output_dir`, or resume with the same ({_FREE_TO_CHANGE})."
                )
        unknown = sorted(there.keys() ^ here.keys())
        if unknown:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            print(
                f"{self.path} was started by another version or out of the hub's reach, and knew other settings, so these can't be compared: "
                f"{', '.join(unknown[:5])}{more}. Make sure that they are as they were.",
                file=sys.stderr,
            )

    def _checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        wanted = str(resume_from_checkpoint or "false")
        if wanted.lower() == "false":
            complete = verified_checkpoints(self.path)
            found = complete[-1].name if complete else self._final_save()
            if found is not None:
                raise ValueError(
                    f"{self.path} already holds this run ({found}); pass `--resume_from_checkpoint true` to go on, or "
                    "choose another `output_dir`."
                )
            return None
        if wanted.lower() == "true":
            return str(last_verified_checkpoint(self.path))
        if not (Path(wanted) / SAVE_RECORD).is_file():
            raise ValueError(f"{wanted} is no complete checkpoint: it has no {SAVE_RECORD}, which is written last.")
        return wanted


def _difference(name: str, there: Any, here: Any) -> str:
    section, _, data = name.partition(".")
    if section == "content":
        return f"the content of {data} is another now (fingerprint {there} there and {here} here)"
    return f"`{name}` is {there!r} there and {here!r} here"


def _by_name(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """`{"streams": {"num_streams": 2}}` as `("streams.num_streams", 2)`."""
    for key, value in settings.items():
        if key in _SECTIONS and isinstance(value, Mapping):
            yield from ((f"{key}.{name}", item) for name, item in value.items())
        else:
            yield key, value
