"""Streams inside attention, once for every implementation.

transformers dispatches attention by name. Functions named after this package and the stock function put the prefix of
the calling module in front of its keys and values and hand over to the stock function. Nothing travels through
`past_key_values`, so gradient checkpointing, caches and position ids stay as they are.

For attention the streams of a sample are extra heads, so that masks, packed documents and paged caches keep batch `B`.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..core.layout import Group, MixedLayout, StreamLayout, UniformLayout
from .config_view import STREAMS, stock_config
from .prefixed_attention import FAMILIES, AttentionInputs, AttentionOutput, call_stock, is_common_eager
from .stream_call import STREAMS_ATTRIBUTE, StreamCall, decoder_streams


ARGUMENTS_PER_KEY = ("indices", "block_indices")
# These stock functions read neither the configuration of a module nor anything else that streams change.
_BLIND_TO_MODULES = ("eager", "sdpa", "flex_attention")


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
        attention_mask: Any,
        **kwargs,
    ) -> AttentionOutput:
        """Attention of `query` `[R, heads, T, d]`; keys and values come as rows or with streams as heads."""
        refuse_arguments_per_key(module, kwargs)
        stock = stock_function(implementation, module)
        inputs = AttentionInputs(stock, module, query, key, value, attention_mask, kwargs)
        call = decoder_streams(module.config).running
        layout = call.layout
        if kwargs.get("cache") is not None and layout.num_streams > 1:
            inputs = _with_pages(implementation, inputs, layout)
        if isinstance(layout, MixedLayout):
            return _attend_by_group(implementation, inputs, layout), None
        return _attend(implementation, inputs, call)

    return attention


def _with_pages(implementation: str, inputs: AttentionInputs, layout: StreamLayout) -> AttentionInputs:
    """Keys and values of all pages of a paged cache, after the new ones went into it."""
    options = dict(inputs.options)
    cache, key, value = options.pop("cache"), layout.to_heads(inputs.key), layout.to_heads(inputs.value)
    key, value = cache.update(key, value, layer_idx=inputs.module.layer_idx, kwargs=options)
    if implementation == "paged|eager":
        options["cache"] = _UpdatedPages()
    return inputs._replace(key=key, value=value, options=options)


def _attend_by_group(implementation: str, inputs: AttentionInputs, layout: MixedLayout) -> torch.Tensor:
    """Every adapter of a mixed batch attends for its own samples, as if it were alone."""
    outputs = [
        _attend(implementation, _of_group(inputs, layout, group), _call_of_group(group))[0] for group in layout.groups
    ]
    order = torch.cat([group.rows for group in layout.groups]).argsort()
    return torch.cat(outputs)[order]


def _call_of_group(group: Group) -> StreamCall:
    return StreamCall(UniformLayout(group.num_streams), group.adapter, 0)


def _of_group(inputs: AttentionInputs, layout: MixedLayout, group: Group) -> AttentionInputs:
    """What is laid out by row or by sample, for the samples of one group only."""
    num_rows, num_heads = inputs.query.shape[0], inputs.key.shape[1]
    num_samples = layout.count_samples(num_rows)
    if inputs.key.shape[0] != num_rows:
        num_heads = group.num_streams * (num_heads // layout.num_streams)

    def select(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            return value
        if value.shape[0] == num_rows:
            return value[group.rows]
        return value[group.samples] if value.shape[0] == num_samples else value

    return inputs._replace(
        query=inputs.query[group.rows],
        key=select(inputs.key)[:, :num_heads],
        value=select(inputs.value)[:, :num_heads],
        mask=select(inputs.mask),
        options={name: select(argument) for name, argument in inputs.options.items()},
    )


def _attend(implementation: str, inputs: AttentionInputs, call: StreamCall) -> AttentionOutput:
    """Attention of samples that all run the same streams."""
    layout = call.layout
    assert isinstance(layout, UniformLayout)
    if call.is_plain:
        return call_stock(inputs._replace(module=_seen_module(implementation, inputs.module, 1)))
    streams = getattr(inputs.module, STREAMS_ATTRIBUTE, None)
    prefix = None if streams is None else streams(call.adapter, inputs.key.dtype, call.chunk)
    has_mask_per_row = inputs.mask is not None and inputs.mask.shape[0] == inputs.query.shape[0]
    attend = call_stock if prefix is None else FAMILIES[implementation]
    is_eager = implementation == "eager"
    if has_mask_per_row or (is_eager and not is_common_eager(inputs.stock)):
        return attend(_as_rows(inputs, layout, prefix))
    module = _seen_module(implementation, inputs.module, layout.num_streams)
    output, weights = attend(_as_heads(inputs._replace(module=module), layout, prefix))
    weights = layout.to_rows(weights) if is_eager and weights is not None else None
    return layout.output_to_rows(output), weights


def _seen_module(implementation: str, module: nn.Module, num_streams: int) -> Any:
    return module if implementation in _BLIND_TO_MODULES else _ModuleForHeads(module, num_streams)


def _as_rows(
    inputs: AttentionInputs, layout: UniformLayout, prefix: tuple[torch.Tensor, torch.Tensor] | None
) -> AttentionInputs:
    """Streams as rows, for functions with their own ideas of what a head is and for masks that differ by row."""
    num_rows, key, value, mask = inputs.query.shape[0], inputs.key, inputs.value, inputs.mask
    if key.shape[0] != num_rows:
        key, value = layout.to_rows(key), layout.to_rows(value)
    if isinstance(mask, torch.Tensor) and 1 < mask.shape[0] < num_rows:
        mask = layout.replicate(mask)
    if prefix is not None:
        batch_size = layout.count_samples(num_rows)
        prefix = (prefix[0].repeat_interleave(batch_size, dim=0), prefix[1].repeat_interleave(batch_size, dim=0))
    return inputs._replace(key=key, value=value, mask=mask, prefix=prefix)


def _as_heads(
    inputs: AttentionInputs, layout: UniformLayout, prefix: tuple[torch.Tensor, torch.Tensor] | None
) -> AttentionInputs:
    """Streams as heads: stream, key-value head, group, so that grouped queries, soft caps and windows need no change."""
    num_rows, key, value = inputs.query.shape[0], inputs.key, inputs.value
    has_rows = key.shape[0] == num_rows
    if has_rows:  # whose streams go among the heads in the copy that puts the prefix in front
        key, value = layout.by_sample(key), layout.by_sample(value)
    if prefix is not None:
        prefix = (prefix[0][None], prefix[1][None])
        prefix = prefix if has_rows else (prefix[0].flatten(1, 2), prefix[1].flatten(1, 2))
    options = {name: _option_for_heads(name, option, num_rows, layout) for name, option in inputs.options.items()}
    inputs = inputs._replace(mask=_mask_for_heads(inputs.mask, layout), options=options)
    return inputs._replace(query=layout.by_sample(inputs.query), key=key, value=value, prefix=prefix)


def _mask_for_heads(mask: Any, layout: UniformLayout) -> Any:
    """A mask `[B or 1, heads, T, S]` of the caller's own, that differs by head, once per stream."""
    differs_by_head = isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[1] > 1
    return mask.repeat(1, layout.num_streams, 1, 1) if differs_by_head else mask


def _option_for_heads(name: str, option: Any, num_rows: int, layout: UniformLayout) -> Any:
    if not isinstance(option, torch.Tensor):
        return option
    if name == "s_aux":
        return option.repeat(layout.num_streams)
    if option.dim() < 2:
        return option
    if name == "position_bias":
        has_rows = option.shape[0] == num_rows
        return layout.to_heads(option) if has_rows else option.repeat(1, layout.num_streams, 1, 1)
    # What is laid out by row is the same for all streams of a sample.
    return option[: layout.count_samples(num_rows)] if option.shape[0] == num_rows else option


def register_stream_attention() -> None:
    """Make transformers find the attention functions that know streams."""
    for implementation in FAMILIES:
        AttentionInterface.register(STREAMS + implementation, _stream_attention(implementation))
