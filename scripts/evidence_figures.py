"""What the tables and pictures of docs/evidence.md show, computed from the rows of the evidence runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from evidence_rows import FINISHED


NUM_BOOTSTRAP = 10_000
CONFIDENCE = 0.95
ENGLISH = ("chat", "documentation", "gsm8k")


@dataclass(frozen=True)
class Difference:
    """Mean difference of two losses in nats per token, negative where the first is better, with its interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


class Results:
    """The finished rows of the runs, by experiment, and the sweeps.

    Args:
        rows: of the table of the runs.
        sweeps: of the table of the sweeps.
    """

    def __init__(self, rows: Sequence[dict[str, str]], sweeps: Sequence[dict[str, str]]):
        self.rows = [row for row in rows if row["status"] == FINISHED]
        self.sweeps = sweeps

    def of(self, name: str) -> list[dict[str, str]]:
        """Rows of an experiment, a seed each."""
        return sorted((row for row in self.rows if row["name"] == name), key=lambda row: int(row["seed"]))

    def names(self) -> list[str]:
        """Experiments, the lowest held-out loss first."""
        return sorted({row["name"]: None for row in self.rows}, key=self.mean)

    def mean(self, name: str, column: str = "heldout_loss") -> float:
        """Mean of a column over the seeds."""
        return statistics.mean(float(row[column]) for row in self.of(name))

    def sweep_losses(self) -> dict[str, dict[float, float]]:
        """Loss on the tuning documents by family and rate; infinite where a run diverged."""
        families: dict[str, dict[float, float]] = {}
        for row in self.sweeps:
            _, family, rate = row["name"].split("/")
            families.setdefault(family, {})[float(rate)] = float(row["tuning_loss"] or "inf")
        return {family: dict(sorted(points.items())) for family, points in families.items()}

    def best_of_sweep(self, family: str) -> float:
        """Lowest loss of a family on the tuning documents."""
        return min(self.sweep_losses()[family].values())

    def start_of(self, family: str) -> float:
        """Loss of a family on the tuning documents before the first step."""
        rows = [row for row in self.sweeps if row["name"].split("/")[1] == family and row["tuning_loss_before"]]
        return float(rows[0]["tuning_loss_before"])

    def spread(self, name: str) -> tuple[float, float]:
        """Lowest and highest held-out loss over the seeds."""
        losses = [float(row["heldout_loss"]) for row in self.of(name)]
        return min(losses), max(losses)

    def forgetting(self, name: str, kind: str | None = None) -> float:
        """How much the loss on English rose above the backbone's; the mean of the kinds, or one of them."""
        kinds = ENGLISH if kind is None else (kind,)
        return statistics.mean(
            self.mean(name, f"loss_{each}") - self.mean("backbone", f"loss_{each}") for each in kinds
        )

    def difference(self, name: str, other: str) -> Difference:
        """Of the loss per document, paired by document; both documents and seeds are drawn again."""
        first, second = (
            np.array([json.loads(row["loss_per_document"]) for row in self.of(each)]) for each in (name, other)
        )
        generator = np.random.default_rng(0)
        num_documents = first.shape[1]
        draws = np.empty(NUM_BOOTSTRAP)
        for i in range(NUM_BOOTSTRAP):
            documents = generator.integers(num_documents, size=num_documents)
            means = [
                losses[generator.integers(len(losses), size=len(losses))].mean(0)[documents].mean()
                for losses in (first, second)
            ]
            draws[i] = means[0] - means[1]
        low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Difference(float(first.mean() - second.mean()), float(low), float(high))

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Tokens and held-out loss while training, the mean over the seeds."""
        curves = [json.loads(row["curve"]) for row in self.of(name)]
        return [(points[0][0], statistics.mean(point[1] for point in points)) for points in zip(*curves)]


class Decoding:
    """Decoding as benchmarks/decode.py measured it with a dynamic cache.

    Args:
        figures: of its JSON file.
    """

    def __init__(self, figures: dict[str, Any]):
        self.machine: str = figures["machine"]
        self._arguments = figures["arguments"]
        steps = [step for step in figures["steps"] if step["cache"] == "dynamic"]
        self._milliseconds = {(step["num_streams"], step["input_len"]): step["ms_per_token"] for step in steps}
        self._memory = {(row["num_streams"], row["input_len"]): row["memory_gib"] for row in figures["rows"]}
        self.streams = sorted({count for count, _ in self._milliseconds})
        self.contexts = sorted({context for _, context in self._milliseconds})

    @property
    def command(self) -> str:
        """What measures this again."""
        contexts = " ".join(str(context) for context in self.contexts)
        streams = " ".join(str(count) for count in self.streams if count > 1)
        shape = f"--streams {streams} --contexts {contexts} --output_len {self._arguments['output_len']}"
        return f"python benchmarks/decode.py --model FOLDER {shape}"

    def milliseconds(self, num_streams: int, context: int) -> float:
        """Median time of a token."""
        return self._milliseconds[num_streams, context]

    def ratio(self, num_streams: int, context: int) -> float:
        """Time per token over the backbone's."""
        return self.milliseconds(num_streams, context) / self.milliseconds(1, context)

    def memory_gib(self, num_streams: int, context: int) -> float:
        """Peak of the tensors."""
        return self._memory[num_streams, context]


def training_arithmetic(row: dict[str, str], tokens: int) -> float:
    """Floating-point operations of training on `tokens`: 4 for every weight, token and stream, 6 if all is trained.

    Forward 2, backward through activations 2, through weights 2 (only where these are trained, which for the adapters
    is next to nothing). Attention itself and replays of checkpointed layers are left out.
    """
    streams = 1 if row["method"] == "prefix_tuning" else int(row["num_streams"])
    per_weight = 6 if row["method"] == "full" else 4
    return per_weight * float(row["num_params"]) * tokens * streams
