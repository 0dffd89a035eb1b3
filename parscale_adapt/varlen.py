"""Packed documents in one row, as flash attention takes them: lengths instead of a mask."""

from typing import Any

import torch


def is_packed(key: torch.Tensor, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether several documents lie in one row, told by lengths (`cu_seq_lens_k`) or by restarting positions."""
    if kwargs.get("cu_seq_lens_k") is not None:
        return True
    positions = kwargs.get("position_ids")
    if positions is None or attention_mask is not None or key.shape[0] > 1 or key.shape[-2] != positions.shape[-1]:
        return False
    return bool((positions[..., 1:] <= positions[..., :-1]).any())


def put_prefix_before_documents(
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Give every document its own copy of the prefix.

    Args:
        key, value: `[1, heads, S, size]`, the documents one after the other.
        prefix_key, prefix_value: `[1, heads, n, size]`.
        kwargs: of the attention call, with `cu_seq_lens_q` and `cu_seq_lens_k` `[num_documents + 1]` and maximal
            lengths, or with `position_ids` `[1, S]`.

    Returns:
        Keys and values `[1, heads, S + num_documents * n, size]`, and the keyword arguments with these lengths.
    """
    num_prefix_tokens = prefix_key.shape[-2]
    kwargs = {**_lengths_from_positions(kwargs), **kwargs}
    starts = kwargs["cu_seq_lens_k"]
    lengths = starts.diff()
    document_of_token = torch.repeat_interleave(torch.arange(len(lengths), device=starts.device), lengths)
    tokens = torch.arange(int(starts[-1]), device=starts.device)
    source = torch.empty(len(tokens) + num_prefix_tokens * len(lengths), dtype=torch.long, device=starts.device)
    source[tokens + num_prefix_tokens * (document_of_token + 1)] = tokens + num_prefix_tokens
    ranks = torch.arange(num_prefix_tokens, device=starts.device)
    first = starts[:-1] + num_prefix_tokens * torch.arange(len(lengths), device=starts.device)
    source[(first[:, None] + ranks).flatten()] = ranks.repeat(len(lengths))
    key = torch.cat([prefix_key, key], dim=-2)[:, :, source]
    value = torch.cat([prefix_value, value], dim=-2)[:, :, source]
    behind = starts + num_prefix_tokens * torch.arange(len(starts), device=starts.device, dtype=starts.dtype)
    return (
        key,
        value,
        {
            **kwargs,
            "cu_seq_lens_k": behind,
            "max_length_k": int(kwargs["max_length_k"]) + num_prefix_tokens,
            "position_ids": None,
        },
    )


def _lengths_from_positions(kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs.get("cu_seq_lens_k") is not None:
        return {}
    positions = kwargs["position_ids"].flatten()
    restarts = (positions[1:] <= positions[:-1]).nonzero().flatten() + 1
    ends = restarts.new_tensor([len(positions)])
    starts = torch.cat([restarts.new_zeros(1), restarts, ends]).to(torch.int32)
    longest = int(starts.diff().max())
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
