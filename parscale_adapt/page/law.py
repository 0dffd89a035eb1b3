"""The figures of the page's law: those of `parscale predict` and `parscale cost`."""

import json
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.backbone_shape import BackboneShape, load_shape
from ..analysis.comparison import compare
from ..analysis.cost import CostModel, Workload
from ..analysis.devices import DEVICES, find_device
from ..analysis.law_source import load_law
from ..analysis.parameter_count import PAPER_SHAPES
from ..analysis.reports import comparison_as_dict, prediction
from ..analysis.runs import PUBLISHED_DATASETS, published_runs
from ..analysis.scaling_law import ScalingLaw


STREAMS = (1, 2, 4, 8)
_NUM_GRID = 60


class LawDesk:
    """Answers what a law says of a backbone, its streams and a device.

    Args:
        own_law: a file that `parscale fit-law --json` wrote, or None.
        own_model: folder of a backbone to choose beside the paper's sizes, or None.

    Raises:
        ValueError: the file holds no law.
    """

    def __init__(self, own_law: str | None = None, own_model: Path | None = None):
        self._laws = [*PUBLISHED_DATASETS]
        self._own_model = own_model
        self._law = cache(load_law)
        self._shape = cache(load_shape)
        self._fitting = threading.Lock()
        if own_law is not None and own_law not in self._laws:
            self._law(own_law)
            self._laws.insert(0, own_law)

    def choices(self) -> dict[str, Any]:
        """What can be chosen, and the sizes of the backbones."""
        shapes = {name: self._shape(name).num_params for name in PAPER_SHAPES}
        if self._own_model is not None:
            try:
                shapes |= {str(self._own_model): self._shape(str(self._own_model)).num_params}
            except ValueError:  # the cost formulas don't cover its architecture
                self._own_model = None
        return {
            "laws": self._laws,
            "devices": list(DEVICES),
            "models": [{"name": name, "label": Path(name).name, "num_params": size} for name, size in shapes.items()],
        }

    def figures(self, query: Mapping[str, str]) -> dict[str, Any]:
        """Predictions, costs and curves for one choice; all sizes in non-embedding parameters, losses in nats per token.

        Args:
            query: `law`, `device`, `model`, and the numbers `num_params`, `num_streams` (at least 2), `batch_size`,
                `input_len`, `output_len`.

        Raises:
            ValueError: something is missing, or no value that it can have.
        """
        law_name, model = query.get("law", ""), query.get("model", "")
        if law_name not in self._laws:
            raise ValueError(f"`law` must be one of {', '.join(self._laws)}, got {law_name!r}.")
        if model not in PAPER_SHAPES and model != str(self._own_model):
            raise ValueError(f"`model` must be one of {', '.join(PAPER_SHAPES)}, got {model!r}.")
        numbers = {name: _number(query, name) for name in ("num_streams", "batch_size", "input_len", "output_len")}
        with self._fitting:  # a law is fitted once, however many ask
            law, shape = self._law(law_name), self._shape(model)
        shape = _widened(shape, _number(query, "num_params"))
        num_streams = numbers.pop("num_streams")
        cost_model = CostModel(shape, find_device(query.get("device", "")))
        workload = Workload(**numbers)
        comparison = compare(cost_model, law, [workload], num_streams)
        counts = sorted({*STREAMS, num_streams})
        points = self._points(law_name)
        return {
            "law": law.as_dict(),
            "predictions": [prediction(law, shape.params_with_streams(count), count) for count in counts],
            "comparison": comparison_as_dict(cost_model, comparison, workload),
            "curves": _curves(
                law, counts, [*points, {"num_params": shape.num_params}, {"num_params": comparison.larger_params}]
            ),
            "points": points,
        }

    def _points(self, law_name: str) -> list[dict[str, Any]]:
        """The runs that a law was fitted to."""
        if law_name in PUBLISHED_DATASETS:
            return [dict(vars(run)) for run in published_runs(law_name)]
        points = json.loads(Path(law_name).read_text(encoding="utf-8")).get("points", [])
        return [{name: point[name] for name in ("num_params", "num_streams", "loss")} for point in points]


def _widened(shape: BackboneShape, num_params: float) -> BackboneShape:
    return shape if num_params == round(shape.num_params) else shape.scaled_to(num_params)


def _curves(law: ScalingLaw, counts: list[int], points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sizes = [point["num_params"] for point in points]
    grid = np.geomspace(min(sizes) / 1.2, max(sizes) * 1.2, _NUM_GRID)
    return [
        {"num_streams": count, "num_params": grid.tolist(), "loss": law.loss(grid, count).tolist()} for count in counts
    ]


def _number(query: Mapping[str, str], name: str) -> int:
    text = query.get(name, "")
    if not text.isascii() or not text.isdecimal() or not 0 < int(text[:20]) < 10**15:
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {text!r}.")
    return int(text)
