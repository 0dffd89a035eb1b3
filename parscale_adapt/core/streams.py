"""Tensor functions of parallel streams; they know nothing of models, PEFT or caches.

Shapes: `P` streams, `B` batch, `T` tokens, `H` hidden size, `n` prefix tokens, `h` heads, `d` head size.
Rows are stream-major: row `p * B + b` is stream `p` of sample `b`.
"""

import torch


def replicate(tensor: torch.Tensor, num_streams: int) -> torch.Tensor:
    """Repeat every sample once per stream: `[B, ...]` to `[P * B, ...]`, stream-major."""
    return tensor.repeat(num_streams, *[1] * (tensor.dim() - 1))


def aggregation_features(hidden_states: torch.Tensor, num_streams: int) -> torch.Tensor:
    """The aggregator's input: `[P * B, T, H]` to `[B, T, H * P]`, hidden index major (element `h * P + p`)."""
    by_stream = hidden_states.view(num_streams, -1, *hidden_states.shape[1:])
    return by_stream.permute(1, 2, 3, 0).flatten(-2)


def smooth_weights(logits: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Softmax in float32, then `w * (1 - smoothing) + smoothing / P` (paper, section 2): `[B, T, P]` to `[B, T, P]`."""
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
    return weights * (1 - smoothing) + smoothing / logits.shape[-1]


def weighted_sum(hidden_states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mix the streams: `[P * B, T, H]` hidden states and `[B, T, P]` weights to `[B, T, H]`, in the states' dtype."""
    by_stream = hidden_states.view(weights.shape[-1], -1, *hidden_states.shape[1:])
    return torch.einsum("btp,pbth->bth", weights, by_stream.to(weights.dtype)).to(hidden_states.dtype)
