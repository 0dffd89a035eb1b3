"""The paper's headline cost figures, computed again: "22x less memory increase and 6x less latency increase".

The paper does not say how it read the cost of parameter scaling "to equal loss" off its figure 4, and the question
is open (https://github.com/QwenLM/ParScale/issues/6). This module computes every reading that the figure allows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .backbone_shape import load_shape
from .comparison import PAPER_BATCH_SIZES, PAPER_LENGTHS, increase_ratio, mean_cost, square_workloads, widened
from .cost import CostModel, Workload
from .devices import find_device
from .fit import fit_law
from .parameter_count import PAPER_SHAPES, parscale_parameters
from .runs import published_runs


BACKBONE, NUM_STREAMS = "1.6B", 8
NEXT_SIZES = ("2.8B", "4.4B")
# (memory, latency) as printed in figure 4, batch 1, and in figure 1, batches 1 to 8 averaged.
PUBLISHED_RATIOS = {"figure 4": (22.0, 6.0), "figure 1": (7.0, 1.7)}
BATCH_SIZES = {"figure 4": (1,), "figure 1": PAPER_BATCH_SIZES}

Point = tuple[float, float]


@dataclass(frozen=True)
class Reading:
    """One way to read the figures, and the two increase ratios that it gives for each.

    Attributes:
        name: how the cost at equal loss is found.
        ratios: (memory, latency) by figure.
    """

    name: str
    ratios: dict[str, Point]

    @property
    def worst_deviation(self) -> float:
        """Largest relative distance from the four published numbers."""
        return max(
            abs(ours / published - 1)
            for figure, pair in PUBLISHED_RATIOS.items()
            for ours, published in zip(self.ratios[figure], pair)
        )


def readings_of_the_paper() -> list[Reading]:
    """Every reading, the one nearest to the paper's four numbers first."""
    losses = measured_losses("stack-v2-python")
    law = fit_law(published_runs("stack-v2-python"), num_bootstrap=0).law
    backbone = load_shape(BACKBONE)
    loss_of_streams = losses[BACKBONE, NUM_STREAMS]
    return sorted(
        [
            _reading("measured losses, straight line between sizes over log N", _size_for(_size_on_log_line(losses))),
            _reading("measured losses, straight line between the panel's points", _on_panel_line(losses)),
            _reading(
                "the panel's line, a ratio for each length, then averaged",
                _on_panel_line(losses),
                ratio_per_length=True,
            ),
            _reading(
                "fitted law, size for the measured loss of P = 8", _size_for(law.params_for_loss(loss_of_streams))
            ),
            _reading(
                "fitted law, equivalent parameters of backbone and adapter",
                _size_for(float(law.equivalent_params(backbone.params_with_streams(NUM_STREAMS), NUM_STREAMS))),
            ),
            _reading(
                "fitted law, equivalent parameters of the backbone alone",
                _size_for(float(law.equivalent_params(backbone.num_params, NUM_STREAMS))),
            ),
            _reading(
                "Pile losses, straight line between sizes over log N",
                _size_for(_size_on_log_line(measured_losses("pile"))),
            ),
        ],
        key=lambda reading: reading.worst_deviation,
    )


def measured_losses(dataset: str) -> dict[tuple[str, int], float]:
    """The published losses of a data set, by name of the size and number of streams."""
    sizes = {
        (parscale_parameters(shape, run.num_streams), run.num_streams): name
        for name, shape in PAPER_SHAPES.items()
        for run in published_runs(dataset)
    }
    return {
        (sizes[int(run.num_params), run.num_streams], run.num_streams): run.loss for run in published_runs(dataset)
    }


CostAtEqualLoss = Callable[[Sequence[Workload]], Point]


def _reading(name: str, at_equal_loss: CostAtEqualLoss, ratio_per_length: bool = False) -> Reading:
    ratios = {}
    for figure, batch_sizes in BATCH_SIZES.items():
        groups = [[length] for length in PAPER_LENGTHS] if ratio_per_length else [list(PAPER_LENGTHS)]
        pairs = [_ratios(square_workloads(batch_sizes, lengths), at_equal_loss) for lengths in groups]
        memory, latency = (sum(values) / len(values) for values in zip(*pairs))
        ratios[figure] = (memory, latency)
    return Reading(name, ratios)


def _ratios(workloads: Sequence[Workload], at_equal_loss: CostAtEqualLoss) -> Point:
    backbone, parallel = _cost(BACKBONE, workloads), _cost(BACKBONE, workloads, NUM_STREAMS)
    memory, latency = (increase_ratio(*values) for values in zip(backbone, parallel, at_equal_loss(workloads)))
    return memory, latency


def _model(size: str) -> CostModel:
    return CostModel(load_shape(size), find_device("a100-80gb"))


def _cost(size: str, workloads: Sequence[Workload], num_streams: int = 1) -> Point:
    cost = mean_cost(_model(size), workloads, num_streams)
    return cost.memory_gib, cost.latency_seconds


def _size_for(num_params: float) -> CostAtEqualLoss:
    """The backbone widened to this size."""

    def at_equal_loss(workloads: Sequence[Workload]) -> Point:
        cost = mean_cost(widened(_model(BACKBONE), num_params), workloads, 1)
        return cost.memory_gib, cost.latency_seconds

    return at_equal_loss


def _on_panel_line(losses: dict[tuple[str, int], float]) -> CostAtEqualLoss:
    """Where the line between the next two sizes' points (cost, loss) reaches the loss of P = 8."""
    share = _share_of_the_way(losses)

    def at_equal_loss(workloads: Sequence[Workload]) -> Point:
        left, right = (_cost(size, workloads) for size in NEXT_SIZES)
        memory, latency = (a + share * (b - a) for a, b in zip(left, right))
        return memory, latency

    return at_equal_loss


def _share_of_the_way(losses: dict[tuple[str, int], float]) -> float:
    left, right = (losses[size, 1] for size in NEXT_SIZES)
    return (left - losses[BACKBONE, NUM_STREAMS]) / (left - right)


def _size_on_log_line(losses: dict[tuple[str, int], float]) -> float:
    """Where the line between the next two sizes' points (log N, loss), as in figure 2, reaches the loss of P = 8."""
    left, right = (math.log(load_shape(size).num_params) for size in NEXT_SIZES)
    return math.exp(left + _share_of_the_way(losses) * (right - left))
