"""Tensor functions of parallel streams; they know nothing of models, PEFT or caches.

Shapes: `P` streams, `B` batch, `T` tokens, `H` hidden size, `n` prefix tokens, `h` heads, `d` head size.
Rows are stream-major: row `p * B + b` is stream `p` of sample `b`.
"""

import torch


def replicate(tensor: torch.Tensor, num_streams: int) -> torch.Tensor:
    """Repeat every sample once per stream: `[B, ...]` to `[P * B, ...]`, stream-major; one stream needs no copy."""
    if num_streams == 1:
        return tensor
    return tensor.repeat(num_streams, *[1] * (tensor.dim() - 1))


def streams_of_chunk(tensor: torch.Tensor, chunk: slice | None) -> torch.Tensor:
    """A view of some streams of a tensor `[P, ...]`; None for all of them."""
    return tensor if chunk is None else tensor[chunk]


def aggregation_features(by_stream: torch.Tensor) -> torch.Tensor:
    """The aggregator's input: `[P, ..., H]` to `[..., H * P]`, hidden index major (element `h * P + p`)."""
    return by_stream.movedim(0, -1).flatten(-2)


def smooth_weights(logits: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Softmax in float32, then `w * (1 - smoothing) + smoothing / P` (paper, section 2): `[B, T, P]` to `[B, T, P]`."""
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
    return weights * (1 - smoothing) + smoothing / logits.shape[-1]


def weighted_sum(hidden_states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mix the streams: `[P * B, T, H]` hidden states and `[B, T, P]` weights to `[B, T, H]`, in the states' dtype.

    The sum is kept in the weights' dtype. It grows stream by stream, so that half-precision states are never copied.
    """
    first, *others = hidden_states.view(weights.shape[-1], -1, *hidden_states.shape[1:]).unbind(0)
    first_share, *shares = weights.unsqueeze(-1).unbind(-2)
    mixed = first * first_share
    for states, share in zip(others, shares):
        mixed = torch.addcmul(mixed, states, share)
    return mixed.to(hidden_states.dtype)
