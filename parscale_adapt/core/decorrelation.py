"""A diversity term: how much the features of different streams are correlated over tokens, to be made small."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable


_SMALLEST_VARIANCE = 1e-6  # added to every feature's; what hardly varies is not correlated with anything


def stream_decorrelation(states: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared correlation between a feature of one stream and a feature of another, over all such pairs.

        loss = loss + 0.1 * stream_decorrelation(states, attention_mask)

    0 where every feature of a stream is uncorrelated with every feature of the others, 1 where all are copies of one. As in
    Barlow Twins (Zbontar et al., 2021) it is read off the cross-correlation matrices `[H, H]` of standardized features,
    but all of their elements are to vanish, the diagonal as well. (ND-LoRA, arXiv 2510.20690, names such a term as its
    source of diversity; its code draws the diagonal to 1, as between two views of one image, where streams agree.) By
    chance alone, `N` tokens give about `1 / N`.

    The matrices are not kept: the pass forward computes the gradient along. It multiplies features `[H, H]` or tokens
    `[N, N]` with each other, whichever is less work; both give the same number. A second derivative is refused by torch.

    Args:
        states: `[num_streams, batch, seq_len, hidden_size]`, at least two streams; computed in float32 or better.
        token_mask: `[batch, seq_len]`, nonzero for the tokens that count, which padding doesn't; None for all.

    Returns:
        A scalar in [0, 1], differentiable once in `states`.

    Raises:
        ValueError: `states` has another shape, or less than two streams, or `token_mask` doesn't fit.
    """
    if states.dim() != 4 or states.shape[0] < 2:
        raise ValueError(
            "`states` must be [num_streams, batch, seq_len, hidden_size] with at least two streams, got "
            f"{list(states.shape)}."
        )
    if token_mask is not None and token_mask.shape != states.shape[1:3]:
        raise ValueError(f"`token_mask` must be {list(states.shape[1:3])}, got {list(token_mask.shape)}.")
    by_token = states.flatten(1, 2) if token_mask is None else states[:, token_mask.bool()]
    with torch.autocast(states.device.type, enabled=False):
        by_token = by_token if by_token.dtype == torch.float64 else by_token.float()
        num_streams, num_tokens, hidden_size = by_token.shape
        if num_tokens == 0:
            return by_token.sum()
        centered = by_token - by_token.mean(1, keepdim=True)
        energy = centered.square().sum(1, keepdim=True) + num_tokens * _SMALLEST_VARIANCE
        total = _SquaredProducts.apply(centered * energy.rsqrt())
    return total / (num_streams * (num_streams - 1) * hidden_size**2)


class _SquaredProducts(torch.autograd.Function):
    """Sum over ordered pairs of different streams of `||z_p.T @ z_q||^2`, of `[P, N, H]`."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor) -> torch.Tensor:
        num_streams, num_tokens, hidden_size = z.shape
        # Half the pairs times H * H * N, against P times N * N * H.
        by_tokens = 2 * num_tokens < (num_streams - 1) * hidden_size
        total, grad = (_by_tokens if by_tokens else _by_features)(z)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        (grad,) = ctx.saved_tensors
        return grad_output * grad


def _by_features(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum and its gradient, by one product `[H, H]` per pair of streams."""
    total, grad = z.new_zeros(()), torch.zeros_like(z)
    for p in range(len(z)):
        for q in range(p):
            product = z[p].T @ z[q]
            total += 2 * product.square().sum()
            grad[p] += 4 * (z[q] @ product.T)
            grad[q] += 4 * (z[p] @ product)
    return total, grad


def _by_tokens(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by one product `[N, N]` per stream, since `||a.T @ b||^2` is the inner product of `a @ a.T` and `b @ b.T`."""
    total, grad = z.new_zeros(()), torch.empty_like(z)
    of_all = z.new_zeros(z.shape[1], z.shape[1])
    for stream in z:
        of_all += stream @ stream.T
    for p, stream in enumerate(z):
        own = stream @ stream.T
        of_others = of_all - own
        total += (own * of_others).sum()
        grad[p] = 4 * (of_others @ stream)
    return total, grad
