"""Folders of runs, finished or running, as curves; whatever is missing or half-written in them is left out."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..files import is_locked
from ..training.run_folder import LOCK_FILE, METRICS_FILE, RUN_FILE
from ..training.run_log import LOG_FILE
from ..training.stream_warnings import StreamWatch


_STATE_FILE = "trainer_state.json"
_WEIGHT = "stream_weight/"
_MAX_DEPTH = 5
_MAX_RUNS = 200
_MAX_POINTS = 1000


class RunReader:
    """Reads what recipes leave below a folder, again at every call.

    Args:
        folder: that holds the runs; it may be missing, or be one run itself.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def overview(self) -> dict[str, Any]:
        """The runs that were written to last, the newest first, with their last figures and what was held out; and how
        many older ones there are."""
        names = sorted(self._names(), key=lambda name: -_last_change(self.folder / name))
        return {
            "folder": str(self.folder),
            "is_there": self.folder.is_dir(),
            "runs": [self._summary(name) for name in names[:_MAX_RUNS]],
            "num_older": len(names[_MAX_RUNS:]),
        }

    def details(self, name: str) -> dict[str, Any]:
        """The curves of one run.

        Raises:
            ValueError: there is no such run below the folder.
        """
        if name not in self._names():
            raise ValueError(f"There is no run {name!r} in {self.folder}: choose another.")
        entries, run = _entries(self.folder / name), _read_object(self.folder / name / RUN_FILE)
        return {**self._summary(name), **_curves(entries), "troubles": _troubles(entries, run.get("streams"))}

    def _names(self) -> list[str]:
        """Paths below the folder; links are not followed, so that nothing outside is read."""
        found = []
        for path, folders, files in os.walk(self.folder):
            depth = len(Path(path).relative_to(self.folder).parts)
            folders[:] = sorted(
                name for name in folders if depth < _MAX_DEPTH and not name.startswith((".", "checkpoint-"))
            )
            if RUN_FILE in files or METRICS_FILE in files:
                found.append(Path(path).relative_to(self.folder).as_posix())
        return found

    def _summary(self, name: str) -> dict[str, Any]:
        folder = self.folder / name
        metrics, run = _read_object(folder / METRICS_FILE), _read_object(folder / RUN_FILE)
        entries = _entries(folder)
        last = entries[-1] if entries else {}
        is_running = is_locked(folder / LOCK_FILE)
        streams = metrics.get("streams") or run.get("streams")
        return {
            "name": name,
            "label": folder.resolve().name,
            "state": "running" if is_running else "finished" if metrics and not _is_newer(folder) else "stopped",
            "num_streams": _number(streams.get("num_streams")) if isinstance(streams, dict) else None,
            "step": _number(last.get("step")),
            "loss": next(
                (loss for entry in reversed(entries) if (loss := _number(entry.get("loss"))) is not None), None
            ),
            "loss_label": metrics.get("loss") if isinstance(metrics.get("loss"), str) else "loss",
            "heldout_loss": _number(metrics.get("heldout_loss")),
            "heldout": _numbers(metrics.get("heldout")),
            "num_tokens": _number(metrics.get("num_tokens")) or _tokens(last),
            "changed": _last_change(folder),
        }


def _entries(folder: Path) -> list[dict[str, Any]]:
    """What a run logged: its own log, or that of an older version's last checkpoint or final report."""
    for path in (folder / LOG_FILE, folder / METRICS_FILE, *_states(folder)):
        if path.name == LOG_FILE:
            found: object = _read_lines(path)
        else:
            found = _read_object(path).get("log_history")
        entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
        if entries:
            return entries
    return []


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"checkpoint-*/{_STATE_FILE}"), key=_changed, reverse=True)


def _curves(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "training": _thin(_series(entries, "loss")),
        "heldout_curve": _thin(_series(entries, "eval_loss")),
        "weights": [_thin(_series(entries, name)) for name in _weight_names(entries)],
        "entropy": _thin(_series(entries, "stream_entropy")),
        "speed": _thin(list(_speed(entries))),
    }


def _troubles(entries: list[dict[str, Any]], streams: object) -> list[str]:
    """What the run itself was warned of."""
    smoothing = _number(streams.get("aggregator_smoothing")) if isinstance(streams, dict) else None
    watch, found = None, []
    for entry in entries:
        weights = [_number(entry.get(name)) for name in _weight_names([entry])]
        step = _number(entry.get("step"))
        if not weights or None in weights or step is None:
            continue
        watch = watch or StreamWatch(len(weights), smoothing or 0.0)
        if len(weights) == watch.num_streams:
            found += watch.see(int(step), weights)  # type: ignore[arg-type]
    return found


def _weight_names(entries: list[dict[str, Any]]) -> list[str]:
    return sorted({name for entry in entries for name in entry if name.startswith(_WEIGHT)}, key=_stream)


def _series(entries: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    points = ((_number(entry.get("step")), _number(entry.get(name))) for entry in entries)
    return [(step, value) for step, value in points if step is not None and value is not None]


def _speed(entries: list[dict[str, Any]]) -> Iterator[tuple[float, float]]:
    """Steps, and tokens per second since the entry before; what was measured meanwhile is not training."""
    for before, entry in pairwise(entries):
        values = [_number(entry.get("step")), *(item.get("time") for item in (before, entry))]
        step, start, end = (_number(value) for value in values)
        tokens = _tokens(before), _tokens(entry)
        if step is None or start is None or end is None or None in tokens or end <= start or "loss" not in entry:
            continue
        yield step, (tokens[1] - tokens[0]) / (end - start)  # type: ignore[operator]


def _tokens(entry: Mapping[str, Any]) -> float | None:
    return _number(entry.get("num_input_tokens_seen", entry.get("num_tokens")))


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """So many points that a picture shows all that it can; the last one is among them."""
    every = -(-len(points) // _MAX_POINTS) or 1
    return points[::-1][::every][::-1]


def _stream(name: str) -> int:
    number = name.rpartition("/")[2]
    return int(number) if number.isdecimal() else -1


def _read_lines(path: Path) -> list[object]:
    return list(_parsed(path, True, _stamp(path)))


def _read_object(path: Path) -> dict[str, Any]:
    found = _parsed(path, False, _stamp(path))
    return found[0] if found and isinstance(found[0], dict) else {}


@lru_cache(maxsize=4 * _MAX_RUNS)
def _parsed(path: Path, is_lines: bool, stamp: tuple[int, int] | None) -> tuple[Any, ...]:
    """The JSON in a file, whole or line by line, parsed again where its `stamp` changed. What is none is left out."""
    if stamp is None:
        return ()
    found = []
    text = _read(path)
    for part in text.splitlines() if is_lines else [text]:
        try:
            found.append(json.loads(part))
        except ValueError:  # of which half is written
            continue
    return tuple(found)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        state = path.lstat()
    except OSError:
        return None
    return None if path.is_symlink() else (state.st_mtime_ns, state.st_size)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _is_newer(folder: Path) -> bool:
    """Whether a run went on after its last report."""
    return _changed(folder / LOG_FILE) > _changed(folder / METRICS_FILE)


def _last_change(folder: Path) -> float:
    return max(_changed(path) for path in (folder / LOG_FILE, folder / METRICS_FILE, folder / RUN_FILE))


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _numbers(values: object) -> dict[str, float]:
    items = values.items() if isinstance(values, dict) else ()
    return {str(name): number for name, value in items if (number := _number(value)) is not None}


def _number(value: object) -> float | None:
    """JSON lacks numbers that are none, and a browser reads none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None  # type: ignore[arg-type, return-value]
