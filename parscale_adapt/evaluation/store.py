"""Scores on disk: one file for each model and measure, written whole when it is finished, and found again by content."""

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import lock_until_the_end, write_text
from .bootstrap import Metric
from .measures import Scores


_VERSION = 1  # of the files; another way of measuring or resampling changes it


class ScoreStore:
    """The folder of an evaluation.

    Args:
        folder: is made, and belongs to this process until it ends.

    Raises:
        ValueError: it can't be written, or another process uses it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock_until_the_end(folder / ".lock")
        except OSError as error:
            raise ValueError(f"`output_dir` is {folder}, which can't be written: {error.strerror}.") from error

    def find(self, model: str, measure: str, content: dict[str, Any]) -> Scores | None:
        """Scores that were made of the same content, whatever model and measure were called; else None.

        What was made under these names of other content is left alone, and told.

        Raises:
            ValueError: a file is damaged.
        """
        path = self._path(model, measure, content)
        same = sorted(self.folder.glob(f"scores/*/*.{_digest(content)}.json"))
        found = path if path.is_file() else next(iter(same), None)
        if found is not None:
            return _scores(_read(found))
        for other in sorted(path.parent.glob(f"{_slug(measure)}.*.json")):
            names = sorted(_differing(_read(other)["content"], _plain(content)))
            print(f"{other} was made with other settings ({', '.join(names)}): it stays there and is not used.")
        return None

    def save(
        self, model: str, measure: str, content: dict[str, Any], scores: Scores, environment: dict[str, Any]
    ) -> None:
        """Write finished scores."""
        path = self._path(model, measure, content)
        path.parent.mkdir(parents=True, exist_ok=True)
        metrics = {name: asdict(metric) for name, metric in scores.metrics.items()}
        values = {
            "model": model,
            "measure": measure,
            "content": _plain(content),
            "metrics": metrics,
            "items": scores.items,
            "environment": environment,
        }
        write_text(path, json.dumps(values, default=_as_json) + "\n")

    def _path(self, model: str, measure: str, content: dict[str, Any]) -> Path:
        return self.folder / "scores" / _slug(model) / f"{_slug(measure)}.{_digest(content)}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is no JSON: remove it, and it is scored again.") from error


def _scores(values: dict[str, Any]) -> Scores:
    return Scores({name: Metric(**metric) for name, metric in values["metrics"].items()}, values["items"])


def _differing(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> set[str]:
    """Names of what is not the same in two mappings, `a.b` for what lies in `a`."""
    names: set[str] = set()
    for name in there.keys() | here.keys():
        one, other = there.get(name), here.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            names |= _differing(one, other, f"{prefix}{name}.")
        elif one != other:
            names.add(f"{prefix}{name}")
    return names


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps([_VERSION, _plain(content)], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(content, default=_as_json))


def _slug(name: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", name)


def _as_json(value: Any) -> Any:
    with suppress(AttributeError):  # arrays and their numbers
        return value.tolist()
    return str(value)
