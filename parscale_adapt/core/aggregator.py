"""Aggregators: P final hidden states to one (paper, section 2, equation 3; compared in Appendix A, Table 6)."""

import torch
from torch import nn

from .streams import aggregation_features, smooth_weights, weighted_sum


class Aggregator(nn.Module):
    """What all aggregators share: a weighted sum of the streams of every token. A subclass gives the `logits`.

    `last_weights` holds the detached weights `[B, T, P]` of the latest forward while `record_weights` is set, for
    logging.

    Args:
        hidden_size: `H`, the size of the decoder's final hidden states.
        num_streams: `P`, at least 2.
        smoothing: `eps` in `w * (1 - eps) + eps / P`; keeps every stream in the gradient.
    """

    def __init__(self, hidden_size: int, num_streams: int, smoothing: float):
        super().__init__()
        self.hidden_size = hidden_size
        self.num_streams = num_streams
        self.smoothing = smoothing
        self.record_weights = False
        self.last_weights: torch.Tensor | None = None

    def reset_parameters(self, init_std: float) -> None:
        """Give new parameters their first values."""
        raise NotImplementedError

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[P * B, T, H]` to `[B, T, P]`."""
        raise NotImplementedError

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[P * B, T, H]` to `[B, T, H]`."""
        weights = smooth_weights(self.logits(hidden_states), self.smoothing)
        if self.record_weights:
            self.last_weights = weights.detach()
        return weighted_sum(hidden_states, weights)


class DynamicAggregator(Aggregator):
    """The paper's choice, a small MLP that sees all streams: `Linear(P * H, H)`, `SiLU`, `Linear(H, P)`.

    The layers keep the published names `0` and `2`.
    """

    def __init__(self, hidden_size: int, num_streams: int, smoothing: float):
        super().__init__(hidden_size, num_streams, smoothing)
        layers = (
            nn.Linear(num_streams * hidden_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, num_streams),
        )
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)

    def reset_parameters(self, init_std: float) -> None:
        """Weights from N(0, `init_std`), biases at 0."""
        for linear in (self[0], self[2]):
            nn.init.normal_(linear.weight, std=init_std)
            nn.init.zeros_(linear.bias)

    def __getitem__(self, index: int) -> nn.Module:
        return self.get_submodule(str(index))

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[P * B, T, H]` to `[B, T, P]`."""
        features = aggregation_features(hidden_states, self.num_streams)
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(self[0].weight.dtype)
        return self[2](self[1](self[0](features)))


class StaticAggregator(Aggregator):
    """One learned weight per stream, the same for every token."""

    def __init__(self, hidden_size: int, num_streams: int, smoothing: float):
        super().__init__(hidden_size, num_streams, smoothing)
        self.weight_logits = nn.Parameter(torch.empty(num_streams))

    def reset_parameters(self, init_std: float) -> None:
        """All streams start with the same weight."""
        nn.init.zeros_(self.weight_logits)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[P * B, T, H]` to `[B, T, P]`."""
        batch_size = hidden_states.shape[0] // self.num_streams
        return self.weight_logits.expand(batch_size, hidden_states.shape[1], -1)


class MeanAggregator(Aggregator):
    """The mean of the streams; nothing is learned."""

    def reset_parameters(self, init_std: float) -> None:
        """Nothing to set."""

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[P * B, T, H]` to zeros `[B, T, P]`."""
        batch_size = hidden_states.shape[0] // self.num_streams
        return hidden_states.new_zeros(batch_size, hidden_states.shape[1], self.num_streams)


AGGREGATORS: dict[str, type[Aggregator]] = {
    "dynamic": DynamicAggregator,
    "static": StaticAggregator,
    "mean": MeanAggregator,
}
