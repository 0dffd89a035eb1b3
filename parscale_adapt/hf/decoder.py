"""Streams around a decoder: rows are replicated on the way in and aggregated on the way out.

The aggregation happens inside the decoder's own call, so that the LM head, and losses that call the decoder without
the causal-LM forward, see B rows.
"""

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache, PreTrainedModel

from ..core.layout import StreamLayout, UniformLayout
from .attention import STREAMS_ATTRIBUTE, SUPPORTED_IMPLEMENTATIONS
from .cache import claim_cache, claim_pages, mark_cache, stream_view, viewed_cache
from .config_view import STREAMS, config_view, stock_config
from .masks import register_stream_masks


_ARGUMENTS_BY_TOKEN = ("input_ids", "inputs_embeds", "position_ids")
_CACHES = ("past_key_values", "cache_params")  # the latter where no layer has attention


def attach_stream_hooks(decoder: PreTrainedModel) -> list[RemovableHandle]:
    """Run `decoder` in as many streams as its child `parscale` says.

    What the child must offer:

    - called on `last_hidden_state` `[R, T, H]`, it returns `[B, T, H]`;
    - `lay_out(batch_size, device)` and `layout`, the [`StreamLayout`] of the coming or running call;
    - `num_prefix_tokens`, `current_adapter` (None = the plain backbone) and `cache_owner`, whose keys and values a
      cache holds;
    - `attended_layers`, as in [`parscale_adapt.hf.cache.stream_view`], and `masks_per_row`, as in [`parscale_adapt.hf.masks`].
    """
    return [
        decoder.register_forward_pre_hook(_enter_streams, with_kwargs=True, prepend=True),
        decoder.register_forward_hook(_leave_streams, with_kwargs=True),
    ]


def route_through_streams(module: nn.Module, decoder: PreTrainedModel) -> None:
    """Let `module`, the decoder or one of its attention modules, look up the functions that know streams."""
    module.config = config_view(stock_config(module.config), STREAMS, decoder)


def restore_stock_functions(module: nn.Module) -> None:
    """Undo [`route_through_streams`]."""
    module.config = stock_config(module.config)


def refuse_unsupported_attention(decoder: PreTrainedModel) -> None:
    """Check the attention implementation that is set now.

    Raises:
        ValueError: it has no counterpart that knows streams.
    """
    name = stock_config(decoder.config)._attn_implementation
    if name not in SUPPORTED_IMPLEMENTATIONS:
        raise ValueError(
            f"`attn_implementation` must be one of {', '.join(SUPPORTED_IMPLEMENTATIONS)} for streams, got {name!r}: "
            'load the backbone with `attn_implementation="sdpa"`.'
        )


def _enter_streams(
    decoder: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    streams = getattr(decoder, STREAMS_ATTRIBUTE)
    refuse_unsupported_attention(decoder)
    arguments = _arguments_by_name(decoder, args, kwargs)
    tokens = arguments["input_ids"] if arguments.get("input_ids") is not None else arguments["inputs_embeds"]
    layout = streams.lay_out(tokens.shape[0], tokens.device)
    cache_name = next((name for name in _CACHES if isinstance(arguments.get(name), Cache)), "past_key_values")
    cache = arguments.get(cache_name)
    if cache is not None:
        claim_cache(cache, streams.cache_owner)
    is_paged = arguments.get("cache") is not None
    if is_paged:
        claim_pages(arguments["cache"], streams.cache_owner)
    if layout.num_streams == 1:
        return None
    if cache is None and _wants_cache(decoder, arguments.get("use_cache")):
        cache = DynamicCache(config=stock_config(decoder.config))
        claim_cache(cache, streams.cache_owner)
    arguments = _with_positions(decoder, arguments, tokens.shape[1])
    arguments = {
        name: _replicate_rows(name, value, tokens.shape[0], layout)
        if not is_paged or name in _ARGUMENTS_BY_TOKEN
        else value
        for name, value in arguments.items()
    }
    if cache is not None:
        view = stream_view(cache, layout, streams.attended_layers)
        view.show_states_as_rows()
        arguments[cache_name] = view
    return (), arguments


def _with_positions(decoder: PreTrainedModel, arguments: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """Count positions from the first real token of every sample, as `generate` does, where they aren't given.

    Rotary backbones see differences of positions only and don't care. Prefix keys aren't rotated, so for streams the
    padding on the left of a sample would shift its tokens away from them.
    """
    mask = arguments.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or arguments.get("position_ids") is not None:
        return arguments
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return arguments
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_tokens:]
    return {**arguments, "position_ids": positions}


def _wants_cache(decoder: PreTrainedModel, use_cache: bool | None) -> bool:
    if "past_key_values" not in inspect.signature(decoder.forward).parameters:
        return False
    # The same rule as in transformers' `merge_with_config_defaults`; with a cache, packed documents aren't recognised.
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        return False
    return getattr(decoder.config, "use_cache", False) if use_cache is None else use_cache


def _arguments_by_name(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    positional = [
        parameter.name
        for parameter in inspect.signature(decoder.forward).parameters.values()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    return {**dict(zip(positional, args)), **kwargs}


def _replicate_rows(name: str, value: Any, batch_size: int, layout: StreamLayout) -> Any:
    """Replicate what is laid out by sample: tensors of two or more dimensions with `batch_size` rows.

    Masks that are ready for attention, of four dimensions, stay, since attention keeps batch `B`.
    """
    if isinstance(value, dict):
        return {key: _replicate_rows(name, item, batch_size, layout) for key, item in value.items()}
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return value
    if name == "attention_mask" and value.dim() == 4:
        return value
    if name == "position_ids" and value.dim() == 3:  # `[axes, B, T]`, positions of several axes
        return layout.replicate(value.transpose(0, 1)).transpose(0, 1)
    return layout.replicate(value) if value.shape[0] == batch_size else value


def _leave_streams(decoder: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    streams = getattr(decoder, STREAMS_ATTRIBUTE)
    layout = streams.layout
    if layout.num_streams == 1:
        for item in output if isinstance(output, tuple) else output.values():
            if isinstance(item, Cache):
                mark_cache(item, streams.cache_owner)
        return None
    view = next((kwargs[name] for name in _CACHES if isinstance(kwargs.get(name), Cache)), None)
    if view is not None:
        view.hide_streams_of_states()
    if isinstance(output, tuple):
        rest = [_caller_cache(item, streams) if isinstance(item, Cache) else item for item in output[1:]]
        return (streams(output[0]), *rest)
    output["last_hidden_state"] = streams(output["last_hidden_state"])
    if output.get("hidden_states") is not None:
        output["hidden_states"] = (*output["hidden_states"][:-1], output["last_hidden_state"])
    for name in _CACHES:
        if isinstance(output.get(name), Cache):
            output[name] = _caller_cache(output[name], streams)
    if output.get("router_logits") is not None and isinstance(layout, UniformLayout):
        # One entry per layer and stream, so that the backbone's balancing loss finds B * T tokens in each.
        output["router_logits"] = tuple(
            stream for layer in output["router_logits"] for stream in layer.chunk(layout.num_streams)
        )
    return output


def _caller_cache(cache: Cache, streams: Any) -> Cache:
    """The cache behind a view; one that a decoder without attention made itself gets batch `B`."""
    if viewed_cache(cache) is cache:
        stream_view(cache, streams.layout, frozenset()).hide_streams_of_states()
        mark_cache(cache, streams.cache_owner)
    return viewed_cache(cache)


register_stream_masks()
