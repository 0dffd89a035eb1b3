"""What the tables and pictures of docs/evidence.md show, computed from the rows of the evidence runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

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
    """The finished main rows of a table, by experiment.

    Args:
        rows: of the CSV.
    """

    def __init__(self, rows: Sequence[dict[str, str]]):
        self.rows = [row for row in rows if row["stage"] == "main" and row["status"] == FINISHED]
        self.sweeps = [row for row in rows if row["stage"] == "sweep"]

    def of(self, name: str) -> list[dict[str, str]]:
        """Rows of an experiment, a seed each."""
        return sorted((row for row in self.rows if row["name"] == name), key=lambda row: int(row["seed"]))

    def names(self) -> list[str]:
        """Experiments in the order of the table."""
        return list(dict.fromkeys(row["name"] for row in self.rows))

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


def training_arithmetic(row: dict[str, str], tokens: int) -> float:
    """Floating-point operations of training on `tokens`: 4 for every weight, token and stream, 6 if all is trained.

    Forward 2, backward through activations 2, through weights 2 (only where these are trained, which for the adapters
    is next to nothing). Attention itself and replays of checkpointed layers are left out.
    """
    streams = 1 if row["method"] == "prefix_tuning" else int(row["num_streams"])
    per_weight = 6 if row["method"] == "full" else 4
    return per_weight * float(row["num_params"]) * tokens * streams
