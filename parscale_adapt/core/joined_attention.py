"""Attention of a few queries over a prefix and a cache that lie apart, so that no key or value is copied."""

import math

import torch


MAX_JOINED_QUERIES = 16
MAX_JOINED_SCORES = 2**17  # 512 KiB in float32 per head and sample


def can_join(num_queries: int, num_keys: int) -> bool:
    """Whether to join scores rather than to copy keys and values behind the prefix.

    The scores of one query are smaller than that copy, however long the cache. Those of several grow with the product
    of both sizes, while a fused kernel over the copy holds none of them.
    """
    is_small = num_queries <= MAX_JOINED_QUERIES and num_queries * num_keys <= MAX_JOINED_SCORES
    return num_queries == 1 or is_small


def attend_over_prefix_and_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    scaling: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the scores of both, joined; the prefix is visible to every query.

    Args:
        query: `[B, heads, T, key_size]`.
        key, value: `[B, key_value_heads, S, key_size or value_size]`.
        prefix: keys and values `[B, key_value_heads, n, key_size or value_size]`.
        attention_mask: True or 0 where visible, `[B or 1, heads or 1, T, S]`; None shows all keys to every query.
        scaling: of the scores, `1 / sqrt(key_size)` if None.

    Returns:
        The output `[B, T, heads, value_size]` and the weights `[B, heads, T, n + S]`.
    """
    batch_size, num_heads, num_queries, key_size = query.shape
    prefix_key, prefix_value = prefix
    num_key_value_heads, num_prefix_tokens = prefix_key.shape[1:3]
    grouped = query.reshape(batch_size, num_key_value_heads, -1, key_size)
    scale = 1 / math.sqrt(key_size) if scaling is None else scaling
    if query.dtype == torch.float16:  # in which products of unscaled queries overflow; a power of two rounds nothing
        grouped, scale = grouped / 16, scale * 16
    # One tensor for both, scaled and masked in place: at this size every copy of the scores is felt.
    num_scores = num_prefix_tokens + key.shape[2]
    scores = query.new_empty(*grouped.shape[:3], num_scores, dtype=torch.float32)
    scores[..., :num_prefix_tokens] = grouped @ prefix_key.mT
    scores[..., num_prefix_tokens:] = grouped @ key.mT
    scores *= scale
    if attention_mask is not None:
        of_cache = scores.view(batch_size, num_heads, num_queries, num_scores)[..., num_prefix_tokens:]
        if attention_mask.dtype == torch.bool:
            of_cache.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            of_cache += attention_mask
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    output = weights[..., :num_prefix_tokens] @ prefix_value + weights[..., num_prefix_tokens:] @ value
    output = output.view(batch_size, num_heads, num_queries, -1).transpose(1, 2)
    return output, weights.view(batch_size, num_heads, num_queries, num_scores)
