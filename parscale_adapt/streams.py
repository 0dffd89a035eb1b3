"""Tensor functions of parallel streams; they know nothing of models, PEFT or caches.

Shapes: `P` streams, `B` batch, `T` tokens, `H` hidden size, `n` prefix tokens, `h` heads, `d` head size.
Rows are stream-major: row `p * B + b` is stream `p` of sample `b`.
"""

import torch


def replicate(tensor: torch.Tensor, num_streams: int) -> torch.Tensor:
    """Repeat every sample once per stream: `[B, ...]` to `[P * B, ...]`, stream-major."""
    return tensor.repeat(num_streams, *[1] * (tensor.dim() - 1))


def fold_streams_into_heads(states: torch.Tensor, num_streams: int) -> torch.Tensor:
    """`[P * B, h, T, d]` to `[B, P * h, T, d]`: streams become heads, stream index major."""
    num_rows, num_heads, seq_len, head_size = states.shape
    batch_size = num_rows // num_streams
    states = states.reshape(num_streams, batch_size, num_heads, seq_len, head_size).transpose(0, 1)
    return states.reshape(batch_size, num_streams * num_heads, seq_len, head_size)


def unfold_streams_from_heads(states: torch.Tensor, num_streams: int) -> torch.Tensor:
    """`[B, P * h, T, d]` to a `[P, B, h, T, d]` view, the inverse of [`fold_streams_into_heads`] up to a reshape."""
    batch_size, num_folded_heads, seq_len, head_size = states.shape
    return states.view(batch_size, num_streams, num_folded_heads // num_streams, seq_len, head_size).transpose(0, 1)


def prepend_prefix(prefix: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Put each stream's prefix in front of its keys or values (paper, section 2).

    Args:
        prefix: `[P, h, n, d]`, learned, not rotated.
        states: `[P * B, h, T, d]` rows, or `[B, P * h, T, d]` as a cache with folded streams returns them.

    Returns:
        `[P * B, h, n + T, d]` in the dtype of `states`.
    """
    num_streams, num_heads, _, head_size = prefix.shape
    if states.shape[1] == num_heads:
        by_stream = states.view(num_streams, -1, num_heads, *states.shape[-2:])
    else:
        by_stream = unfold_streams_from_heads(states, num_streams)
    batch_size = by_stream.shape[1]
    expanded = prefix.to(states.dtype)[:, None].expand(-1, batch_size, -1, -1, -1)
    return torch.cat([expanded, by_stream], dim=-2).view(num_streams * batch_size, num_heads, -1, head_size)


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
