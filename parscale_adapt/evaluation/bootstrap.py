"""Intervals: what a score would have been on other items of the same kind, by resampling the items (percentile bootstrap).

The draws depend on the task alone. So the replicates of two models on one task belong to the same draws, and their
differences are paired; the tasks of a group are drawn independently of each other.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


NUM_REPLICATES = 1000
CONFIDENCE = 0.95


@dataclass
class Metric:
    """A score and its replicates under resampled items.

    Args:
        value: over all items.
        higher_is_better: None where nobody says.
        num_items: how many there are; fewer than two say nothing about others, and have no replicates.
        replicates: `NUM_REPLICATES` of them, or none.
    """

    value: float
    higher_is_better: bool | None
    num_items: int
    replicates: list[float] = field(default_factory=list, repr=False)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Lowest and highest value at [`CONFIDENCE`]; None without replicates."""
        return percentile_interval(self.replicates)


def resampled(
    value: float,
    higher_is_better: bool | None,
    num_items: int,
    statistic: Callable[[np.ndarray], float],
    key: str,
) -> Metric:
    """A metric with replicates.

    Args:
        value: of all items.
        higher_is_better: or not.
        num_items: n.
        statistic: the value of the items with these indices, int64 `[n]`.
        key: name of the task; equal keys and numbers of items give equal draws.
    """
    replicates: list[float] = []
    if num_items > 1:
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
        generator = np.random.default_rng(seed)
        draws = (generator.integers(num_items, size=num_items) for _ in range(NUM_REPLICATES))
        replicates = [float(statistic(draw)) for draw in draws]
    return Metric(float(value), higher_is_better, num_items, replicates)


def statistic_of(items: Sequence[Any], aggregate: Callable[[list[Any]], float], is_mean: bool) -> Callable:
    """`aggregate` as a function of indices; means of numbers are taken by numpy, which is a hundred times faster."""
    if is_mean and all(isinstance(item, bool | int | float) for item in items):
        values = np.asarray(items, dtype=np.float64)
        return lambda indices: values[indices].mean()
    return lambda indices: aggregate([items[index] for index in indices])


def ratio_of_sums(numerators: np.ndarray, denominators: np.ndarray) -> Callable[[np.ndarray], float]:
    """Sum over sum, such as loss over tokens, of the items with some indices."""

    def statistic(indices: np.ndarray) -> float:
        below = denominators[indices].sum()
        return numerators[indices].sum() / below if below else float("nan")

    return statistic


@dataclass(frozen=True)
class Difference:
    """How much higher a score of one model is than that of another on the same items."""

    value: float
    interval: tuple[float, float] | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def paired_difference(metric: Metric, other: Metric) -> Difference:
    """`metric - other`, of the same task and items."""
    pairs = [one - two for one, two in zip(metric.replicates, other.replicates, strict=True)]
    return Difference(metric.value - other.value, percentile_interval(pairs))


def percentile_interval(replicates: Sequence[float]) -> tuple[float, float] | None:
    """The middle [`CONFIDENCE`] of replicates; None where there are none, or where one is no number."""
    if not replicates or not np.isfinite(replicates).all():
        return None
    low, high = np.quantile(replicates, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
