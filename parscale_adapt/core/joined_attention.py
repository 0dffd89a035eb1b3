"""Attention of a few queries over a prefix and a cache that lie apart, so that no key or value is copied."""

import math

import torch


def attend_over_prefix_and_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """Softmax over the scores of both, joined; the prefix is visible to every query.

    Args:
        query: `[B, heads, T, key_size]`.
        key, value: `[B, key_value_heads, S, key_size or value_size]`.
        prefix_key, prefix_value: `[B, key_value_heads, n, key_size or value_size]`.
        attention_mask: True or 0 where visible, `[B or 1, heads or 1, T, S]`; None shows all keys to every query.
        scaling: of the scores, `1 / sqrt(key_size)` if None.

    Returns:
        `[B, T, heads, value_size]`.
    """
    batch_size, num_heads, num_queries, key_size = query.shape
    num_key_value_heads, num_prefix_tokens = prefix_key.shape[1:3]
    grouped = query.reshape(batch_size, num_key_value_heads, -1, key_size)
    scale = 1 / math.sqrt(key_size) if scaling is None else scaling
    scores = torch.matmul(grouped, key.transpose(-1, -2)).float() * scale
    if attention_mask is not None:
        by_head = scores.view(batch_size, num_heads, num_queries, -1)
        if attention_mask.dtype == torch.bool:
            by_head = by_head.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            by_head = by_head + attention_mask
        scores = by_head.view_as(scores)
    prefix_scores = torch.matmul(grouped, prefix_key.transpose(-1, -2)).float() * scale
    weights = torch.softmax(torch.cat([prefix_scores, scores], dim=-1), dim=-1).to(value.dtype)
    output = torch.matmul(weights[..., :num_prefix_tokens], prefix_value)
    output = output + torch.matmul(weights[..., num_prefix_tokens:], value)
    return output.view(batch_size, num_heads, num_queries, -1).transpose(1, 2)
