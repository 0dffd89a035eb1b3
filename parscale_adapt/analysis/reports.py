"""What commands and the page say of predictions and of costs, as JSON has it."""

from dataclasses import asdict

from .comparison import Comparison
from .cost import Cost, CostModel, Workload
from .scaling_law import ScalingLaw
from .sizes import size_text


def prediction(law: ScalingLaw, num_params: float, num_streams: int) -> dict[str, float]:
    """What a law says of `num_params` non-embedding parameters in P streams; the loss in nats per token."""
    return {
        "num_streams": num_streams,
        "num_params": num_params,
        "loss": float(law.loss(num_params, num_streams)),
        "equivalent_params": float(law.equivalent_params(num_params, num_streams)),
        "gain": float(law.gain(num_streams)),
    }


def named_costs(model: CostModel, comparison: Comparison) -> dict[str, Cost]:
    """The costs of a comparison by the name of what has them: the backbone, its streams, the larger model."""
    return {
        f"{model.shape.name}, P = 1": comparison.backbone,
        f"{model.shape.name}, P = {comparison.num_streams}": comparison.parallel,
        f"{size_text(comparison.larger_params)}, P = 1": comparison.larger,
    }


def comparison_as_dict(model: CostModel, comparison: Comparison, workload: Workload) -> dict[str, object]:
    """A comparison of one workload; memory in GiB, time in seconds, losses in nats per token."""
    params = (model.shape.num_params, model.shape.num_params, comparison.larger_params)
    return {
        "model": model.shape.name,
        "device": model.device.name,
        "num_prefix_tokens": model.num_prefix_tokens,
        "loss": comparison.loss,
        "equal_loss": comparison.equal_loss,
        "larger_params": comparison.larger_params,
        "memory_ratio": comparison.memory_ratio,
        "latency_ratio": comparison.latency_ratio,
        "rows": [
            {
                "name": name,
                "backbone_params": num_params,
                "num_streams": num_streams,
                **asdict(workload),
                "memory_gib": cost.memory_gib,
                "latency_seconds": cost.latency_seconds,
                "fits": model.fits(cost),
                **asdict(cost),
            }
            for (name, cost), num_streams, num_params in zip(
                named_costs(model, comparison).items(), (1, comparison.num_streams, 1), params
            )
        ],
    }
