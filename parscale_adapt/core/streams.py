"""Tensor functions of parallel streams; they know nothing of models, PEFT or caches.

Shapes: `P` streams, `B` batch, `T` tokens, `H` hidden size, `n` prefix tokens, `h` heads, `d` head size.
Rows are stream-major: row `p * B + b` is stream `p` of sample `b`.
"""

import torch


def replicate(tensor: torch.Tensor, num_streams: int) -> torch.Tensor:
    """Repeat every sample once per stream: `[B, ...]` to `[P * B, ...]`, stream-major."""
    return tensor.repeat(num_streams, *[1] * (tensor.dim() - 1))


def fold_streams_into_heads(states: torch.Tensor, num_streams: int) -> torch.Tensor:
    """`[P * B, h, ...]` to `[B, P * h, ...]`: streams become heads, stream index major."""
    by_stream = states.reshape(num_streams, -1, *states.shape[1:]).transpose(0, 1)
    return by_stream.reshape(by_stream.shape[0], -1, *states.shape[2:])


def unfold_streams_from_heads(states: torch.Tensor, num_streams: int) -> torch.Tensor:
    """`[B, P * h, ...]` to `[P * B, h, ...]`, the inverse of [`fold_streams_into_heads`]."""
    batch_size, num_folded_heads = states.shape[:2]
    by_sample = states.view(batch_size, num_streams, num_folded_heads // num_streams, *states.shape[2:])
    return by_sample.transpose(0, 1).flatten(0, 1)


def unfold_streams_of_output(output: torch.Tensor, num_streams: int) -> torch.Tensor:
    """`[B, T, P * h, d]`, as attention functions return it, to a contiguous `[P * B, T, h, d]`."""
    by_sample = output.unflatten(2, (num_streams, -1))
    return by_sample.permute(2, 0, 1, 3, 4).flatten(0, 1).contiguous()


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
