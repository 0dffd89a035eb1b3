"""The prefix in front of keys and values, one function per family of attention implementations.

They get what one attention function was called with, laid out either as rows or with streams as heads, and hand over to
the stock function of transformers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from ..core.joined_attention import attend_over_prefix_and_cache, can_join
from ..core.packed_documents import lengths_of_documents, put_prefix_before_documents


_NOT_JOINED = ("position_bias", "softcap", "s_aux")  # left to the stock functions, of which some refuse one

AttentionOutput = tuple[torch.Tensor, torch.Tensor | None]


class AttentionInputs(NamedTuple):
    """What one attention function was called with. `N` is R rows, or B samples with streams among the heads.

    Args:
        stock: transformers' function of the implementation.
        module: the attention module, as `stock` should see it.
        query: `[N, heads, T, key_size]`, or a view `[B, P, heads, T, key_size]` that is laid out with the next copy.
        key, value: `[N, key_value_heads, S, key_size or value_size]`, or such views.
        mask: as the mask function of the implementation made it.
        options: further keyword arguments.
        prefix: keys and values `[N or 1, key_value_heads, n, key_size or value_size]`, visible to every query; with as
            many dimensions as `key`.
    """

    stock: Callable
    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    options: dict[str, Any]
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None


def call_stock(inputs: AttentionInputs) -> AttentionOutput:
    """The stock function, without a prefix or with one that is among the keys already."""
    query, key, value = map(_among_heads, (inputs.query, inputs.key, inputs.value))
    return inputs.stock(inputs.module, query, key, value, inputs.mask, **inputs.options)


def _among_heads(states: torch.Tensor) -> torch.Tensor:
    """Streams `[B, P, heads, ...]` among the heads: a copy, unless a copy was made since the rows were seen by sample."""
    return states.flatten(1, 2) if states.dim() == 5 else states


def _prefix_of_every_sample(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    assert inputs.prefix is not None
    key, value = inputs.prefix
    return key.expand(len(inputs.key), *key.shape[1:]), value.expand(len(inputs.value), *value.shape[1:])


def _put_prefix_first(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values with the prefix in front, each in one copy."""
    prefix_key, prefix_value = _prefix_of_every_sample(inputs)
    return torch.cat([prefix_key, inputs.key], dim=-2), torch.cat([prefix_value, inputs.value], dim=-2)


def attend_by_concatenation(inputs: AttentionInputs) -> AttentionOutput:
    """The prefix in front of keys and values; masks and position biases get `n` columns that show it."""
    key, value = _put_prefix_first(inputs)
    num_prefix_tokens, options, mask = key.shape[-2] - inputs.key.shape[-2], inputs.options, inputs.mask
    if options.get("position_bias") is not None:
        options = {**options, "position_bias": F.pad(options["position_bias"], (num_prefix_tokens, 0))}
    if isinstance(mask, torch.Tensor):
        mask = F.pad(mask, (num_prefix_tokens, 0), value=0.0 if mask.dtype.is_floating_point else 1)
    return call_stock(inputs._replace(key=key, value=value, mask=mask, options=options))


def attend_by_sdpa(inputs: AttentionInputs) -> AttentionOutput:
    """A few queries over a cache join scores, so that no key is copied; many without a mask keep the causal flag."""
    if _can_join(inputs):
        return _attend_jointly(inputs)[0], None
    if inputs.mask is None and inputs.query.shape[-2] > 1:
        return _attend_causally(inputs)
    return attend_by_concatenation(inputs)


def attend_by_eager(inputs: AttentionInputs) -> AttentionOutput:
    """As by concatenation; a few queries over a cache join scores where the architecture's function is the common one."""
    if is_common_eager(inputs.stock) and _can_join(inputs):
        return _attend_jointly(inputs)
    return attend_by_concatenation(inputs)


def attend_by_flex(inputs: AttentionInputs) -> AttentionOutput:
    """A few queries over a cache, whose mask is dense (masks.py), join scores; the prefix is in the block mask of others."""
    mask = inputs.mask
    if not isinstance(mask, torch.Tensor):
        return attend_by_concatenation(inputs)
    if _can_join(inputs):
        return _attend_jointly(inputs)[0], None
    if mask.dtype == torch.bool:  # the stock function adds dense masks to the scores
        mask = torch.zeros_like(mask, dtype=inputs.query.dtype).masked_fill(~mask, torch.finfo(inputs.query.dtype).min)
    return attend_by_concatenation(inputs._replace(mask=mask))


@torch.compiler.assume_constant_result
def is_common_eager(stock: Callable) -> bool:
    """Whether an architecture's eager function is, instruction by instruction, the one that transformers copies into most
    of them, which does nothing but scale, mask and group heads. Others have their own ideas of what a head is."""
    from transformers.models.llama.modeling_llama import eager_attention_forward, repeat_kv

    its_repeat = getattr(stock, "__globals__", {}).get("repeat_kv")
    pairs = ((stock, eager_attention_forward), (its_repeat, repeat_kv))
    return all(_instructions(its) == _instructions(common) for its, common in pairs)


def _instructions(function: Callable | None) -> tuple:
    code = getattr(function, "__code__", None)
    return () if code is None else (code.co_code, code.co_consts, code.co_names, code.co_varnames)


def _attend_jointly(inputs: AttentionInputs) -> AttentionOutput:
    query, key, value = map(_among_heads, (inputs.query, inputs.key, inputs.value))
    prefix_key, prefix_value = map(_among_heads, _prefix_of_every_sample(inputs))
    scaling = inputs.options.get("scaling")
    return attend_over_prefix_and_cache(query, key, value, (prefix_key, prefix_value), inputs.mask, scaling)


def _can_join(inputs: AttentionInputs) -> bool:
    num_queries = inputs.query.shape[-2]
    is_decoding = num_queries == 1 or inputs.mask is not None
    return (
        is_decoding
        and can_join(num_queries, inputs.key.shape[-2])
        and not any(inputs.options.get(name) is not None for name in _NOT_JOINED)
        and not inputs.options.get("dropout")
    )


def _attend_causally(inputs: AttentionInputs) -> AttentionOutput:
    """sdpa's causal flag aligns to the upper left: behind n zero queries, token t sees the prefix and 0..t."""
    key, value = _put_prefix_first(inputs)
    num_prefix_tokens, options = key.shape[-2] - inputs.key.shape[-2], inputs.options
    if options.get("position_bias") is not None:
        bias = F.pad(options["position_bias"], (num_prefix_tokens, 0, num_prefix_tokens, 0))
        options = {**options, "position_bias": bias}
    output, weights = call_stock(
        inputs._replace(query=F.pad(inputs.query, (0, 0, num_prefix_tokens, 0)), key=key, value=value, options=options)
    )
    return output[:, num_prefix_tokens:], weights


def attend_by_flash(inputs: AttentionInputs) -> AttentionOutput:
    """As by concatenation; where documents are packed in one row, each gets its own copy of the prefix.

    Raises:
        ValueError: there are tokens behind a sliding window, to which flash attention can't show a prefix.
    """
    options = lengths_of_documents(inputs.key, inputs.mask, inputs.options)
    _refuse_window(options, inputs.key.shape[-2])
    if options.get("cu_seq_lens_k") is None:
        return attend_by_concatenation(inputs._replace(options=options))
    assert inputs.prefix is not None
    key, value, prefix_key, prefix_value = map(_among_heads, (inputs.key, inputs.value, *inputs.prefix))
    key, value, options = put_prefix_before_documents(key, value, prefix_key, prefix_value, options)
    return call_stock(inputs._replace(key=key, value=value, mask=None, options=options))


def _refuse_window(options: dict[str, Any], num_keys: int) -> None:
    window, longest = options.pop("sliding_window", None), options.get("max_length_k") or num_keys
    if window is not None and longest > window:
        raise ValueError(
            f"Flash attention can't show a prefix to tokens behind its sliding window of {window} tokens, got "
            f'{longest}: load the backbone with `attn_implementation="sdpa"` or "flex_attention".'
        )


FAMILIES: dict[str, Callable[[AttentionInputs], AttentionOutput]] = {
    "eager": attend_by_eager,
    "sdpa": attend_by_sdpa,
    "flex_attention": attend_by_flex,
    "flash_attention_2": attend_by_flash,
    "flash_attention_3": attend_by_flash,
    "paged|eager": attend_by_concatenation,
}
SUPPORTED_IMPLEMENTATIONS = tuple(FAMILIES)
