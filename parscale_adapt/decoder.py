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

from .attention import STREAMS_ATTRIBUTE, route_through_streams
from .cache import claim_cache, stream_view, viewed_cache
from .streams import replicate


def attach_stream_hooks(decoder: PreTrainedModel) -> list[RemovableHandle]:
    """Run `decoder` in as many streams as its child module `parscale` says (`num_streams`, 1 = as it is).

    The child is called on `last_hidden_state` `[P * B, T, H]` and returns `[B, T, H]`. Its `current_adapter` tells
    apart whose keys and values a cache holds (None = the plain backbone's); `attended_shapes` are the sizes of keys
    and values in attention, as in [`parscale_adapt.cache.stream_view`].
    """
    return [
        decoder.register_forward_pre_hook(_enter_streams, with_kwargs=True, prepend=True),
        decoder.register_forward_hook(_leave_streams, with_kwargs=True),
    ]


def _enter_streams(
    decoder: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    streams = getattr(decoder, STREAMS_ATTRIBUTE)
    num_streams = streams.num_streams
    arguments = _arguments_by_name(decoder, args, kwargs)
    cache = arguments.get("past_key_values")
    if cache is not None:
        claim_cache(cache, streams.current_adapter)
    if num_streams == 1:
        return None
    route_through_streams(decoder)
    tokens = arguments["input_ids"] if arguments.get("input_ids") is not None else arguments["inputs_embeds"]
    batch_size = tokens.shape[0]
    arguments = {name: _replicate_rows(value, batch_size, num_streams) for name, value in arguments.items()}
    if cache is None and _wants_cache(decoder, arguments.get("use_cache")):
        cache = DynamicCache(config=decoder.config)
        claim_cache(cache, streams.current_adapter)
    if cache is not None:
        arguments["past_key_values"] = stream_view(cache, num_streams, streams.attended_shapes)
    return (), arguments


def _wants_cache(decoder: PreTrainedModel, use_cache: bool | None) -> bool:
    # The same rule as in transformers' `merge_with_config_defaults`; with a cache, packed documents aren't recognised.
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        return False
    return getattr(decoder.config, "use_cache", False) if use_cache is None else use_cache


def _arguments_by_name(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    positional = [
        parameter.name
        for parameter in inspect.signature(decoder.forward).parameters.values()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    return {**dict(zip(positional, args)), **kwargs}


def _replicate_rows(value: Any, batch_size: int, num_streams: int) -> Any:
    """Replicate what is laid out by sample: tensors of two or more dimensions with `batch_size` rows."""
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == batch_size:
        return replicate(value, num_streams)
    if isinstance(value, dict):
        return {key: _replicate_rows(item, batch_size, num_streams) for key, item in value.items()}
    return value


def _leave_streams(decoder: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    streams = getattr(decoder, STREAMS_ATTRIBUTE)
    if streams.num_streams == 1:
        return None
    if isinstance(output, tuple):
        rest = [viewed_cache(item) if isinstance(item, Cache) else item for item in output[1:]]
        return (streams(output[0]), *rest)
    output["last_hidden_state"] = streams(output["last_hidden_state"])
    if output.get("past_key_values") is not None:
        output["past_key_values"] = viewed_cache(output["past_key_values"])
    if output.get("router_logits") is not None:
        # One entry per layer and stream, so that the backbone's balancing loss finds B * T tokens in each.
        output["router_logits"] = tuple(
            stream for layer in output["router_logits"] for stream in layer.chunk(streams.num_streams)
        )
    return output
