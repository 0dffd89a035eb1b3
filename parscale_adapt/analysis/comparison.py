"""Parallel scaling against parameter scaling to the same loss: the comparison of the paper's section 3.3, for any model."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from .cost import Cost, CostModel, Workload
from .scaling_law import ScalingLaw


# What figure 4 averages over: input length = output length.
PAPER_LENGTHS = (64, 128, 256, 512)
PAPER_BATCH_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Comparison:
    """A backbone, the same with P streams, and the larger one-stream model of equal predicted loss.

    Attributes:
        num_streams: P.
        larger_params: N' of the larger model, in non-embedding parameters.
        loss: predicted loss of the backbone with one stream, nats per token.
        equal_loss: predicted loss that P streams and the larger model share.
        backbone: cost of the backbone with one stream.
        parallel: cost of the backbone with P streams.
        larger: cost of the larger model with one stream.
    """

    num_streams: int
    larger_params: float
    loss: float
    equal_loss: float
    backbone: Cost
    parallel: Cost
    larger: Cost

    @property
    def memory_ratio(self) -> float:
        """How many times the added memory of P streams the larger model adds."""
        return increase_ratio(self.backbone.memory_gib, self.parallel.memory_gib, self.larger.memory_gib)

    @property
    def latency_ratio(self) -> float:
        """How many times the added latency of P streams the larger model adds."""
        return increase_ratio(
            self.backbone.latency_seconds, self.parallel.latency_seconds, self.larger.latency_seconds
        )


def increase_ratio(backbone: float, parallel: float, larger: float) -> float:
    """Increase of parameter scaling over increase of parallel scaling, both from the backbone."""
    return (larger - backbone) / (parallel - backbone)


def square_workloads(batch_sizes: Sequence[int], lengths: Sequence[int] = PAPER_LENGTHS) -> list[Workload]:
    """Workloads with input length = output length, for averages like the paper's."""
    return [Workload(batch, length, length) for batch in batch_sizes for length in lengths]


def mean_cost(model: CostModel, workloads: Sequence[Workload], num_streams: int) -> Cost:
    """Each part of the cost, averaged over the workloads."""
    if not workloads:
        raise ValueError("an average cost needs at least one workload, got none")
    costs = [model.estimate(workload, num_streams) for workload in workloads]
    return Cost(
        **{field.name: sum(getattr(cost, field.name) for cost in costs) / len(costs) for field in fields(Cost)}
    )


def widened(model: CostModel, num_params: float) -> CostModel:
    """The same model at the width that gives it `num_params` non-embedding parameters."""
    return replace(model, shape=model.shape.scaled_to(num_params))


def compare(model: CostModel, law: ScalingLaw, workloads: Sequence[Workload], num_streams: int) -> Comparison:
    """P streams against the wider model that the law gives the same loss.

    Args:
        model: backbone, device and number of prefix tokens.
        law: relates parameters, streams and loss.
        workloads: averaged over.
        num_streams: P, at least 2.

    Raises:
        ValueError: P is 1, so there is nothing to compare.
    """
    if num_streams < 2:
        raise ValueError(f"a comparison with parameter scaling needs at least 2 streams, got {num_streams}")
    num_params = model.shape.params_with_streams(num_streams, model.num_prefix_tokens)
    larger_params = float(law.equivalent_params(num_params, num_streams))
    return Comparison(
        num_streams=num_streams,
        larger_params=larger_params,
        loss=float(law.loss(model.shape.num_params, 1)),
        equal_loss=float(law.loss(num_params, num_streams)),
        backbone=mean_cost(model, workloads, 1),
        parallel=mean_cost(model, workloads, num_streams),
        larger=mean_cost(widened(model, larger_params), workloads, 1),
    )
