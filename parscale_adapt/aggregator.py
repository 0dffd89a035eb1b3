"""The aggregator: P final hidden states to one (paper, section 2, equation 3)."""

import torch
from torch import nn

from .streams import aggregation_features, smooth_weights, weighted_sum


class Aggregator(nn.Sequential):
    """A small MLP that weighs the streams of every token: `Linear(P * H, H)`, `SiLU`, `Linear(H, P)`.

    The layers keep the published names `0` and `2`. `last_weights` holds the detached weights `[B, T, P]` of the
    latest forward while `record_weights` is set, for logging.

    Args:
        hidden_size: `H`, the size of the decoder's final hidden states.
        num_streams: `P`, at least 2.
        smoothing: `eps` in `w * (1 - eps) + eps / P`; keeps every stream in the gradient.
    """

    def __init__(self, hidden_size: int, num_streams: int, smoothing: float):
        super().__init__(
            nn.Linear(num_streams * hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, num_streams)
        )
        self.num_streams = num_streams
        self.smoothing = smoothing
        self.record_weights = False
        self.last_weights: torch.Tensor | None = None

    def reset_parameters(self, init_std: float) -> None:
        """Weights from N(0, `init_std`), biases at 0."""
        for linear in (self[0], self[2]):
            nn.init.normal_(linear.weight, std=init_std)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[P * B, T, H]` to `[B, T, H]`."""
        features = aggregation_features(hidden_states, self.num_streams)
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(self[0].weight.dtype)
        weights = smooth_weights(super().forward(features), self.smoothing)
        if self.record_weights:
            self.last_weights = weights.detach()
        return weighted_sum(hidden_states, weights)
