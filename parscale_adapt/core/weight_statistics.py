"""How the aggregator weighs the streams: sums over tokens, which add up over batches."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WeightSums:
    """Sums over tokens of what the aggregator's weights say.

    Attributes:
        num_tokens: tokens summed over.
        weights: `[P]` weight of each stream.
        entropy: entropy of a token's weights, in nats.
        largest: `[P]` tokens at which a stream has the largest weight; `k` streams that tie get `1 / k` each.
    """

    num_tokens: int
    weights: torch.Tensor
    entropy: torch.Tensor
    largest: torch.Tensor

    def __add__(self, other: "WeightSums") -> "WeightSums":
        return WeightSums(
            self.num_tokens + other.num_tokens,
            self.weights + other.weights,
            self.entropy + other.entropy,
            self.largest + other.largest,
        )


def weight_sums(weights: torch.Tensor) -> WeightSums:
    """Sum `[N, P]` weights over tokens, in double precision on the CPU."""
    by_token = weights.detach().cpu().double()
    is_largest = (by_token == by_token.amax(-1, keepdim=True)).double()
    return WeightSums(
        num_tokens=by_token.shape[0],
        weights=by_token.sum(0),
        entropy=torch.special.entr(by_token).sum(),
        largest=(is_largest / is_largest.sum(-1, keepdim=True)).sum(0),
    )


def stream_statistics(weights: torch.Tensor, token_mask: torch.Tensor | None = None) -> dict[str, float]:
    """What a training log says about the aggregator's weights.

    Args:
        weights: `[B, T, P]`.
        token_mask: `[B, T]`, nonzero for the tokens that count; None for all.

    Returns:
        `stream_entropy` (mean, in nats) and for every stream `p` `stream_weight/p` (mean) and `stream_largest/p`
        (share of tokens at which it has the largest weight).
    """
    counted = weights.flatten(0, -2) if token_mask is None else weights[token_mask.bool()]
    sums = weight_sums(counted)
    num_tokens = max(sums.num_tokens, 1)
    statistics = {"stream_entropy": sums.entropy.item() / num_tokens}
    for name, values in (("weight", sums.weights), ("largest", sums.largest)):
        statistics |= {f"stream_{name}/{p}": value / num_tokens for p, value in enumerate(values.tolist())}
    return statistics
