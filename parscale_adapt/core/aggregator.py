"""Aggregators: P final hidden states to one (paper, section 2, equation 3; compared in Appendix A, Table 6)."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

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


_TOKENS_AT_ONCE = 1024


class _LinearOfFeatures(torch.autograd.Function):
    """`features @ weight.T + bias`, where neither pass holds the features `[N, H * P]` of many tokens.

    A few tokens come in one piece. Otherwise a piece of the features is as large as one stream: the forward cuts tokens
    and the backward cuts hidden elements, so that every sum is one matrix product, as if the features were whole.
    """

    @staticmethod
    def forward(
        ctx: Any, by_stream: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(by_stream, weight)
        ctx.dtype = dtype
        num_streams, num_tokens, _ = by_stream.shape
        pieces = by_stream.tensor_split(num_streams if num_tokens > _TOKENS_AT_ONCE else 1, dim=1)
        weight, bias = weight.to(dtype), bias.to(dtype)
        return torch.cat([F.linear(aggregation_features(piece).to(dtype), weight, bias) for piece in pieces])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        by_stream, weight = ctx.saved_tensors
        num_streams, num_tokens, hidden_size = by_stream.shape
        needs_states, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_states = torch.empty_like(by_stream) if needs_states else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        weight = weight.to(ctx.dtype)
        size = -(-hidden_size // num_streams)
        for start in range(0, hidden_size, size):
            end = min(start + size, hidden_size)
            columns = slice(start * num_streams, end * num_streams)
            if grad_states is not None:
                grad_features = (grad @ weight[:, columns]).view(num_tokens, end - start, num_streams)
                grad_states[..., start:end] = grad_features.movedim(-1, 0)
            if grad_weight is not None:
                features = aggregation_features(by_stream[..., start:end]).to(ctx.dtype)
                grad_weight[:, columns] = grad.T @ features
        return grad_states, grad_weight, grad.sum(0) if needs_bias else None, None


class FeatureProjection(nn.Module):
    """`Linear(P * H, H)` of the features of all streams, which are made of the streams in passing.

    It is no `nn.Linear`: what wraps or replaces those, such as LoRA on all linear layers, would hand it features.
    """

    def __init__(self, hidden_size: int, num_streams: int):
        super().__init__()
        linear = nn.Linear(num_streams * hidden_size, hidden_size)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, by_stream: torch.Tensor) -> torch.Tensor:
        """`[P, B, T, H]` to `[B, T, H]`, in the weight's dtype or that of autocast."""
        device_type = by_stream.device.type
        is_autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if is_autocast else self.weight.dtype
        projected = _LinearOfFeatures.apply(by_stream.flatten(1, 2), self.weight, self.bias, dtype)
        return projected.view(by_stream.shape[1:])


class DynamicAggregator(Aggregator):
    """The paper's choice, a small MLP that sees all streams: `Linear(P * H, H)`, `SiLU`, `Linear(H, P)`.

    The layers keep the published names `0` and `2`.
    """

    def __init__(self, hidden_size: int, num_streams: int, smoothing: float):
        super().__init__(hidden_size, num_streams, smoothing)
        layers = (
            FeatureProjection(hidden_size, num_streams),
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
        by_stream = hidden_states.view(self.num_streams, -1, *hidden_states.shape[1:])
        return self[2](self[1](self[0](by_stream)))


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
