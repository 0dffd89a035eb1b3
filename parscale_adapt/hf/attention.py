"""The prefix inside attention, once for every implementation.

transformers dispatches attention by name. `parscale_sdpa` and its siblings put the prefix of the calling module in
front of its keys and values and hand over to the stock function of that name. Nothing travels through
`past_key_values`, so gradient checkpointing, caches and position ids stay as they are.

For attention the streams of a sample are extra heads, so that masks, packed documents and paged caches keep batch `B`.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..core.joined_attention import attend_over_prefix_and_cache
from ..core.layout import Group, MixedLayout, UniformLayout
from ..core.packed_documents import lengths_of_documents, put_prefix_before_documents
from ..core.streams import unfold_streams_of_output
from .config_view import STREAMS, stock_config


SUPPORTED_IMPLEMENTATIONS = (
    "eager",
    "sdpa",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "paged|eager",
)
STREAMS_ATTRIBUTE = "parscale"
ARGUMENTS_PER_KEY = ("indices", "block_indices")
MAX_JOINED_QUERIES = 16


class _ModuleForHeads:
    """An attention module as its stock function should see it: with the stock configuration, and with its learned
    attention sinks `[heads]` once per stream."""

    def __init__(self, module: nn.Module, num_streams: int):
        self._module = module
        self.config = stock_config(module.config)
        if num_streams > 1 and "sinks" in module._parameters:
            self.sinks = module.sinks.repeat(num_streams)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _UpdatedPages:
    """Hands keys and values that are already up to date to an attention function that asks a paged cache for them."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ...]:
        return key_states, value_states


def stock_function(implementation: str, module: nn.Module) -> Callable:
    """transformers' function of that name; each architecture has its own eager one.

    Raises:
        ValueError: the architecture of `module` has no eager function by the usual name.
    """
    if implementation == "eager":
        # transformers passes the eager function only as a default of the look-up.
        for module_class in type(module).__mro__:
            function = vars(sys.modules[module_class.__module__]).get("eager_attention_forward")
            if function is not None:
                return function
        raise ValueError(
            f"{type(module).__name__} has no eager attention function that streams can call; load the backbone with "
            '`attn_implementation="sdpa"`.'
        )
    return ALL_ATTENTION_FUNCTIONS[implementation]


def refuse_arguments_per_key(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse sparse attention, among whose chosen keys there is no place for a prefix.

    Raises:
        ValueError: the attention function was told which single keys to look at.
    """
    for name in ARGUMENTS_PER_KEY:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} picks single keys (`{name}`), which streams don't support: there is no "
                "place for a prefix among them."
            )


def _stream_attention(implementation: str) -> Callable:
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of `query` `[R, heads, T, d]`; keys and values come as rows or with streams as heads."""
        refuse_arguments_per_key(module, kwargs)
        layout = module.config.stream_decoder.parscale.layout
        if kwargs.get("cache") is not None and layout.num_streams > 1:
            key, value = layout.to_heads(key), layout.to_heads(value)
            key, value = kwargs.pop("cache").update(key, value, layer_idx=module.layer_idx, kwargs=kwargs)
            kwargs |= {"cache": _UpdatedPages()} if implementation == "paged|eager" else {}
        if isinstance(layout, MixedLayout):
            return _attend_by_group(implementation, module, query, key, value, attention_mask, layout, kwargs)
        adapter = module.config.stream_decoder.parscale.current_adapter
        return _attend(implementation, module, query, key, value, attention_mask, layout, adapter, kwargs)

    return attention


def _attend_by_group(
    implementation: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: MixedLayout,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """Every adapter of a mixed batch attends for its own samples, as if it were alone."""
    num_rows = query.shape[0]
    outputs = []
    for group in layout.groups:
        select = partial(_select, group=group, num_rows=num_rows, num_samples=layout.count_samples(num_rows))
        num_heads = key.shape[1]
        if key.shape[0] != num_rows:
            num_heads = group.num_streams * (num_heads // layout.num_streams)
        output, _ = _attend(
            implementation,
            module,
            query[group.rows],
            select(key)[:, :num_heads],
            select(value)[:, :num_heads],
            select(attention_mask),
            UniformLayout(group.num_streams),
            group.adapter,
            {name: select(argument) for name, argument in kwargs.items()},
        )
        outputs.append(output)
    order = torch.cat([group.rows for group in layout.groups]).argsort()
    return torch.cat(outputs)[order], None


def _select(value: Any, group: Group, num_rows: int, num_samples: int) -> Any:
    """What is laid out by row or by sample, for one group only."""
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return value
    if value.shape[0] == num_rows:
        return value[group.rows]
    return value[group.samples] if value.shape[0] == num_samples else value


def _attend(
    implementation: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    layout: UniformLayout,
    adapter: str | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if layout.num_streams == 1:
        stock = stock_function(implementation, module)
        return stock(_seen_module(implementation, module, 1), query, key, value, attention_mask, **kwargs)
    streams = getattr(module, STREAMS_ATTRIBUTE, None)
    prefix = None if streams is None else streams(adapter, key.dtype)
    num_rows = query.shape[0]
    has_mask_per_row = attention_mask is not None and attention_mask.shape[0] == num_rows
    if implementation == "eager" or has_mask_per_row:
        if key.shape[0] != num_rows:
            key, value = layout.to_rows(key), layout.to_rows(value)
        if isinstance(attention_mask, torch.Tensor) and not has_mask_per_row and attention_mask.shape[0] > 1:
            attention_mask = layout.replicate(attention_mask)
        if prefix is not None:
            batch_size = num_rows // layout.num_streams
            prefix = tuple(states.repeat_interleave(batch_size, dim=0) for states in prefix)
        return _attend_behind_prefix(implementation, module, query, key, value, attention_mask, prefix, kwargs)

    if key.shape[0] == num_rows:
        key, value = layout.to_heads(key), layout.to_heads(value)
    if prefix is not None:
        prefix = tuple(states.flatten(0, 1)[None] for states in prefix)
    arguments = {name: _argument_for_heads(name, argument, num_rows, layout) for name, argument in kwargs.items()}
    module = _seen_module(implementation, module, layout.num_streams)
    query = layout.to_heads(query)
    output, _ = _attend_behind_prefix(implementation, module, query, key, value, attention_mask, prefix, arguments)
    return unfold_streams_of_output(output, layout.num_streams), None


def _seen_module(implementation: str, module: nn.Module, num_streams: int) -> Any:
    # eager, sdpa and flex_attention read neither the configuration nor anything else that streams change.
    return module if implementation in ("eager", "sdpa", "flex_attention") else _ModuleForHeads(module, num_streams)


def _argument_for_heads(name: str, argument: Any, num_rows: int, layout: UniformLayout) -> Any:
    if not isinstance(argument, torch.Tensor):
        return argument
    if name == "s_aux":
        return argument.repeat(layout.num_streams)
    if argument.dim() < 2:
        return argument
    if name == "position_bias":
        has_rows = argument.shape[0] == num_rows
        return layout.to_heads(argument) if has_rows else argument.repeat(1, layout.num_streams, 1, 1)
    # What is laid out by row is the same for all streams of a sample.
    return argument[: num_rows // layout.num_streams] if argument.shape[0] == num_rows else argument


def _attend_behind_prefix(
    implementation: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    prefix: tuple[torch.Tensor, ...] | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stock attention with the prefix in front of keys and values.

    Args:
        query: `[N, heads, T, key_size]`, with `N` = R rows, or N = B samples and streams among the heads.
        key, value: `[N, key_value_heads, S, key_size or value_size]`.
        attention_mask: as the mask function of that implementation made it.
        prefix: keys and values `[N or 1, key_value_heads, n, key_size or value_size]`, or None.
    """
    stock = stock_function(implementation, module)
    if prefix is None:
        return stock(module, query, key, value, attention_mask, **kwargs)
    num_prefix_tokens, num_queries = prefix[0].shape[-2], query.shape[-2]
    prefix_key, prefix_value = (states.expand(key.shape[0], -1, -1, -1) for states in prefix)
    if _can_join(implementation, query, attention_mask, kwargs):
        scaling = kwargs.get("scaling")
        output = attend_over_prefix_and_cache(query, key, value, prefix_key, prefix_value, attention_mask, scaling)
        return output, None
    if implementation.startswith("flash"):
        kwargs = lengths_of_documents(key, attention_mask, kwargs)
        _refuse_window(key, kwargs)
        if kwargs.get("cu_seq_lens_k") is not None:
            key, value, kwargs = put_prefix_before_documents(key, value, prefix_key, prefix_value, kwargs)
            return stock(module, query, key, value, None, **kwargs)
    key, value = torch.cat([prefix_key, key], dim=-2), torch.cat([prefix_value, value], dim=-2)
    bias = kwargs.get("position_bias")
    if attention_mask is None and implementation == "sdpa" and num_queries > 1:
        # sdpa's causal flag aligns to the upper left: with n zero queries in front, token t sees prefix and 0..t.
        query = F.pad(query, (0, 0, num_prefix_tokens, 0))
        if bias is not None:
            kwargs = {**kwargs, "position_bias": F.pad(bias, (num_prefix_tokens, 0, num_prefix_tokens, 0))}
        output, weights = stock(module, query, key, value, None, **kwargs)
        return output[:, num_prefix_tokens:], weights
    if bias is not None:
        kwargs = {**kwargs, "position_bias": F.pad(bias, (num_prefix_tokens, 0))}
    if isinstance(attention_mask, torch.Tensor):
        attention_mask = _show_prefix(attention_mask, num_prefix_tokens)
    return stock(module, query, key, value, attention_mask, **kwargs)


def _can_join(implementation: str, query: torch.Tensor, attention_mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether scores of prefix and cache can be joined instead of copying the cache behind the prefix."""
    num_queries = query.shape[-2]
    is_decoding = num_queries == 1 or (attention_mask is not None and num_queries <= MAX_JOINED_QUERIES)
    is_plain = kwargs.get("position_bias") is None and not kwargs.get("dropout")
    return implementation == "sdpa" and is_decoding and is_plain


def _show_prefix(attention_mask: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """Add `n` visible columns on the left of a `[..., T, S]` or `[N, S]` mask."""
    visible = 0.0 if attention_mask.dtype.is_floating_point else 1
    return F.pad(attention_mask, (num_prefix_tokens, 0), value=visible)


def _refuse_window(key: torch.Tensor, kwargs: dict[str, Any]) -> None:
    window, longest = kwargs.pop("sliding_window", None), kwargs.get("max_length_k") or key.shape[-2]
    if window is not None and longest > window:
        raise ValueError(
            f"Flash attention can't show a prefix to tokens behind its sliding window of {window} tokens, got "
            f'{longest}: load the backbone with `attn_implementation="sdpa"` or "flex_attention".'
        )


for _implementation in SUPPORTED_IMPLEMENTATIONS:
    AttentionInterface.register(STREAMS + _implementation, _stream_attention(_implementation))
