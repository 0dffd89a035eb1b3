"""Intervals and paired differences, beside scipy's bootstrap."""

import numpy as np
import pytest
import scipy.stats

from parscale_adapt.evaluation.bootstrap import (
    NUM_REPLICATES,
    Metric,
    paired_difference,
    percentile_interval,
    ratio_of_sums,
    resampled,
    statistic_of,
)


RIGHT = np.random.default_rng(0).random(200) < 0.3
ALSO = RIGHT ^ (np.random.default_rng(1).random(200) < 0.1)  # mostly right and wrong on the same items


def mean_of(items, key="task"):
    items = [float(item) for item in items]
    return resampled(np.mean(items), True, len(items), statistic_of(items, np.mean, is_mean=True), key)


def scipys(statistic, *samples):
    found = scipy.stats.bootstrap(
        samples, statistic, n_resamples=9999, method="percentile", paired=True, vectorized=False, rng=3
    )
    return found.confidence_interval.low, found.confidence_interval.high


def test_an_interval_is_that_of_scipy():
    metric = mean_of(RIGHT)
    assert len(metric.replicates) == NUM_REPLICATES
    assert metric.interval == pytest.approx(scipys(np.mean, RIGHT.astype(float)), abs=0.015)


def test_a_ratio_is_resampled_by_items_with_their_weights():
    generator = np.random.default_rng(2)
    tokens = generator.integers(1, 500, size=60).astype(float)
    nats = tokens * generator.normal(2, 0.5, size=60)
    metric = resampled(nats.sum() / tokens.sum(), False, 60, ratio_of_sums(nats, tokens), "text")
    expected = scipys(lambda one, other: one.sum() / other.sum(), nats, tokens)
    assert metric.interval == pytest.approx(expected, abs=0.03)


def test_a_difference_is_paired_item_by_item():
    one, other = mean_of(RIGHT), mean_of(ALSO)
    difference = paired_difference(one, other)
    assert difference.value == pytest.approx(RIGHT.mean() - ALSO.mean())
    expected = scipys(lambda a, b: np.mean(a) - np.mean(b), RIGHT.astype(float), ALSO.astype(float))
    assert difference.interval == pytest.approx(expected, abs=0.01)
    width = difference.interval[1] - difference.interval[0]
    assert width < 0.75 * (one.interval[1] - one.interval[0])  # drawn independently it would be wider than either
    assert not difference.is_clear
    assert paired_difference(mean_of(RIGHT), mean_of(np.zeros(200))).is_clear


def test_tasks_are_drawn_independently_of_each_other():
    first, second = mean_of(RIGHT, "one"), mean_of(RIGHT, "two")
    assert abs(np.corrcoef(first.replicates, second.replicates)[0, 1]) < 0.15
    assert first.replicates == mean_of(RIGHT, "one").replicates


def test_any_aggregate_can_be_resampled():
    items = [[1, 2], [3, 4], [5, 60]]
    slow = resampled(60, True, 3, statistic_of(items, lambda some: max(b for _, b in some), is_mean=False), "task")
    assert set(slow.replicates) == {2.0, 4.0, 60.0}


def test_one_item_says_nothing_about_others():
    metric = mean_of([1.0])
    assert metric.replicates == []
    assert metric.interval is None
    assert paired_difference(metric, metric).interval is None
    assert percentile_interval([1.0, float("nan")]) is None
    assert Metric(1.0, None, 1).interval is None
