"""Packed documents in one row, as flash attention takes them: lengths instead of a mask."""

from typing import Any

import torch


_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def lengths_of_documents(
    key: torch.Tensor, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Add the lengths of the documents that lie in one row, where positions tell them by starting again.

    Args:
        key: `[B, heads, S, key_size]`.
        attention_mask: `[B, S]` where tokens are padded; flash attention then goes by the mask alone.
        kwargs: of the attention call; lengths that it has already are kept.

    Returns:
        `kwargs`, with `cu_seq_lens_q` and `cu_seq_lens_k` `[num_documents + 1]` and the longest lengths unless one
        document takes the whole row.
    """
    without = {name: value for name, value in kwargs.items() if name not in _LENGTHS}
    if attention_mask is not None:
        return without
    positions = kwargs.get("position_ids")
    if kwargs.get("cu_seq_lens_k") is None:
        if positions is None or key.shape[0] > 1 or positions.shape[-1] == 1:
            return dict(kwargs)
        kwargs = kwargs | lengths_of_positions(positions.flatten())
    is_one = len(kwargs["cu_seq_lens_k"]) == 2
    if is_one and kwargs["max_length_q"] == kwargs["max_length_k"] == key.shape[-2]:
        return {**without, "position_ids": None}  # where transformers would look for documents again
    return dict(kwargs)


def lengths_of_positions(positions: torch.Tensor) -> dict[str, Any]:
    """The lengths of documents whose positions `[T]` start again, as flash attention's arguments; waits for the device."""
    restarts = (positions[1:] <= positions[:-1]).nonzero().flatten() + 1
    ends = restarts.new_tensor([len(positions)])
    starts = torch.cat([restarts.new_zeros(1), restarts, ends]).to(torch.int32)
    longest = int(starts.diff().max())
    return dict(zip(_LENGTHS, (starts, starts, longest, longest)))


def put_prefix_before_documents(
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Give every document its own copy of the prefix; nothing is read back from the device.

    Args:
        key, value: `[1, heads, S, size]`, the documents one after the other; what follows the last one stays behind it.
        prefix_key, prefix_value: `[1, heads, n, size]`.
        kwargs: of the attention call, with the lengths of [`lengths_of_documents`].

    Returns:
        Keys and values `[1, heads, S + num_documents * n, size]`, and the keyword arguments with these lengths.
    """
    num_prefix_tokens, num_tokens, starts = prefix_key.shape[-2], key.shape[-2], kwargs["cu_seq_lens_k"]
    num_documents = len(starts) - 1
    tokens = torch.arange(num_tokens, device=key.device)
    ranks = torch.arange(num_prefix_tokens, device=key.device)
    num_started = torch.searchsorted(starts[:-1].long(), tokens, right=True)
    added = num_prefix_tokens * torch.arange(num_documents + 1, device=key.device, dtype=starts.dtype)
    source = tokens.new_empty(num_tokens + num_documents * num_prefix_tokens)
    source[tokens + num_prefix_tokens * num_started] = tokens + num_prefix_tokens
    source[(starts + added)[:-1, None] + ranks] = ranks
    key = torch.cat([prefix_key, key], dim=-2)[:, :, source]
    value = torch.cat([prefix_value, value], dim=-2)[:, :, source]
    return (
        key,
        value,
        {
            **kwargs,
            "cu_seq_lens_k": starts + added,
            "max_length_k": kwargs["max_length_k"] + num_prefix_tokens,
            "position_ids": None,
        },
    )
