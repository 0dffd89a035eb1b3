"""Training runs as points of a scaling law: read from a CSV file, from a folder of runs, or from the paper."""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


CSV_COLUMNS = ("num_params", "num_streams", "loss")
METRICS_KEYS = ("num_params", "num_streams", "heldout_loss")
PUBLISHED_DATASETS = ("stack-v2-python", "pile")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        num_params: non-embedding parameters, backbone and adapter together.
        num_streams: P, the number of parallel streams.
        loss: held-out cross entropy in nats per token.
    """

    num_params: float
    num_streams: int
    loss: float


def as_arrays(runs: Sequence[Run]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The runs as three arrays: parameters, streams, losses."""
    table = np.array([(run.num_params, run.num_streams, run.loss) for run in runs], dtype=np.float64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def read_runs(source: str | Path, dataset: str | None = None) -> list[Run]:
    """Read runs from wherever `source` points.

    Args:
        source: a CSV file, a folder with `metrics.json` files below it, or the name of a published data set
            (`stack-v2-python`, `pile`: the 24 + 24 points of the paper).
        dataset: which rows to keep when a CSV file has a `dataset` column.

    Raises:
        ValueError: nothing to read, or a value that no run can have.
    """
    if str(source) in PUBLISHED_DATASETS:
        return published_runs(str(source))
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_csv(path, dataset)
    raise ValueError(
        f"`{source}` is neither a CSV file, nor a folder of runs, nor one of {', '.join(PUBLISHED_DATASETS)}: "
        "give one of the three"
    )


def published_runs(dataset: str) -> list[Run]:
    """The 24 points that the paper fits (figure 2): six sizes with 1, 2, 4 and 8 streams, 42B tokens each."""
    if dataset not in PUBLISHED_DATASETS:
        raise ValueError(f"no published data set is called `{dataset}`: choose one of {', '.join(PUBLISHED_DATASETS)}")
    with resources.as_file(resources.files(__package__) / "published_points.csv") as path:
        return _read_csv(path, dataset)


def _read_csv(path: Path, dataset: str | None) -> list[Run]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: save the table as CSV in UTF-8") from error
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True, restval="")
    columns = [name.strip() for name in reader.fieldnames or []]
    reader.fieldnames = columns
    missing = [name for name in CSV_COLUMNS if name not in columns]
    if missing:
        raise ValueError(
            f"{path} has no column {_quoted(missing)} (it has {_quoted(columns) or 'no header'}): "
            f"name the columns {', '.join(CSV_COLUMNS)}"
        )
    rows = [(f"{path} line {reader.line_num}", row) for row in reader]
    rows = _select_dataset(path, rows, dataset, "dataset" in columns)
    return _checked(path, [_parse_run(where, row, CSV_COLUMNS) for where, row in rows])


def _select_dataset(
    path: Path, rows: list[tuple[str, dict[str, str]]], dataset: str | None, has_column: bool
) -> list[tuple[str, dict[str, str]]]:
    """Losses on different data sets follow different laws, so a file that mixes them needs a choice."""
    if not has_column:
        if dataset is not None:
            raise ValueError(f"{path} has no column `dataset`, so rows of `{dataset}` cannot be chosen")
        return rows
    names = sorted({row["dataset"] for _, row in rows})
    if dataset is None and len(names) > 1:
        raise ValueError(f"{path} mixes the data sets {', '.join(names)}, one law fits one of them: choose a data set")
    if dataset is not None and dataset not in names:
        raise ValueError(f"{path} has no rows of data set `{dataset}`, only of {', '.join(names)}")
    return [(where, row) for where, row in rows if dataset is None or row["dataset"] == dataset]


def _read_folder(folder: Path) -> list[Run]:
    runs = []
    for path in sorted(folder.rglob("metrics.json")):
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}): is the run still being written?") from error
        missing = [key for key in METRICS_KEYS if not isinstance(metrics, dict) or key not in metrics]
        if missing:
            raise ValueError(f"{path} has no key {_quoted(missing)}: a run needs {', '.join(METRICS_KEYS)}")
        runs.append(_parse_run(str(path), metrics, METRICS_KEYS))
    if not runs:
        raise ValueError(f"no metrics.json below {folder}: give the folder that holds the runs")
    return _checked(folder, runs)


def _parse_run(where: str, row: Mapping[str, object], keys: Sequence[str]) -> Run:
    num_params, num_streams, loss = (_parse_number(where, key, row[key]) for key in keys)
    if num_params <= 0:
        raise ValueError(f"{where}: `{keys[0]}` must be positive, got {num_params:g}")
    if num_streams < 1 or num_streams != int(num_streams):
        raise ValueError(f"{where}: `{keys[1]}` must be a whole number of at least 1, got {num_streams:g}")
    if loss <= 0:
        raise ValueError(f"{where}: `{keys[2]}` must be positive (nats per token), got {loss:g}")
    return Run(num_params, int(num_streams), loss)


def _parse_number(where: str, key: str, value: object) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where}: `{key}` must be a number, got {value!r}")
    return number


def _checked(source: Path, runs: list[Run]) -> list[Run]:
    if not runs:
        raise ValueError(f"{source} has a header but no rows: add one row per training run")
    return runs


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
