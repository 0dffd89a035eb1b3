"""The door of a decoder: streams enter and leave in one wrapped `forward`.

Rows are replicated on the way in and aggregated on the way out, inside the decoder's own `forward`, so that the LM head,
losses that call the decoder without the causal-LM forward, and engines that call `forward` past module hooks see B rows.
"""

import inspect
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from ..core.layout import StreamLayout, UniformLayout
from ..core.packed_documents import lengths_of_positions
from .attention import register_stream_attention
from .cache import (
    can_be_filled_in_chunks,
    chunk_view,
    claim_cache,
    claim_pages,
    describe_owner,
    mark_cache,
    stream_view,
    viewed_cache,
)
from .config_view import STREAMS, config_view, stock_config
from .masks import register_stream_masks
from .prefixed_attention import SUPPORTED_IMPLEMENTATIONS
from .stream_call import STREAMS_ATTRIBUTE, DecoderStreamsProtocol


_TOKENS = ("input_ids", "inputs_embeds")
_ARGUMENTS_BY_TOKEN = (*_TOKENS, "position_ids")
_CACHES = ("past_key_values", "cache_params")  # the latter where no layer has attention


class StreamDoor:
    """The `forward` of a decoder whose child `parscale`, a [`DecoderStreamsProtocol`], runs it in streams.

    An object and not a closure, so that copies and pickles of the decoder have a door of their own.

    Args:
        decoder: the decoder.
        inner: the `forward` of this very object where it has one, such as that of accelerate's hooks; None for that of
            its class.
    """

    def __init__(self, decoder: PreTrainedModel, inner: Callable | None):
        self.decoder = decoder
        self.inner = inner
        self.__signature__ = inspect.signature(inner or type(decoder).forward.__get__(decoder))
        self.parameters = tuple(self.__signature__.parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the decoder's own `forward`; `last_hidden_state` is the aggregated `[B, T, H]`."""
        streams: DecoderStreamsProtocol = getattr(self.decoder, STREAMS_ATTRIBUTE)
        refuse_unsupported_attention(self.decoder)
        arguments = {**dict(zip(self.parameters, args)), **kwargs}
        tokens = next((arguments[name] for name in _TOKENS if arguments.get(name) is not None), None)
        if tokens is None:
            raise ValueError(f"{type(self.decoder).__name__} needs `input_ids` or `inputs_embeds`, got neither.")
        layout = streams.open_call(tokens.shape[0], tokens.device).layout
        try:
            cache_name, cache = _claimed_cache(arguments, streams)
            if layout.num_streams == 1:
                return _marked(self.run_stock(arguments), streams)
            arguments = self._with_positions(arguments, tokens.shape[1])
            if len(tokens) == 1 and cache is None:
                arguments = self._with_lengths(arguments)
            in_chunks = self._runs_in_chunks(arguments, cache, streams, layout)
            if cache is None and self._wants_cache(arguments.get("use_cache"), in_chunks):
                cache = DynamicCache(config=stock_config(self.decoder.config))
                claim_cache(cache, streams.cache_owner)
            if in_chunks and (cache is None or (tokens.shape[1] > 1 and can_be_filled_in_chunks(cache))):
                output = self._run_in_chunks(arguments, tokens.shape[0], streams, cache_name, cache)
                return _mixed(output, streams, layout)
            arguments = _with_rows(arguments, tokens.shape[0], layout)
            if cache is None:
                return _mixed(self.run_stock(arguments), streams, layout)
            view = stream_view(cache, layout, streams.attended_layers)
            view.show_states_as_rows()
            try:
                output = self.run_stock({**arguments, cache_name: view})
            finally:
                view.hide_streams_of_states()
            return _mixed(output, streams, layout)
        finally:
            streams.close_call()

    def run_stock(self, arguments: dict[str, Any]) -> Any:
        """The decoder without streams; its class is looked up at the call, since FSDP2 puts another one in its place."""
        if self.inner is not None:
            return self.inner(**arguments)
        return type(self.decoder).forward(self.decoder, **arguments)

    def _runs_in_chunks(
        self, arguments: dict[str, Any], cache: Cache | None, streams: DecoderStreamsProtocol, layout: StreamLayout
    ) -> bool:
        """Whether a few streams run at a time: always in a step of training, else without a cache, or without gradients,
        of which each replay would fill it once more.

        Raises:
            ValueError: in a step of training, a cache is asked for.
        """
        if streams.chunk_size is None or not isinstance(layout, UniformLayout):
            return False
        if streams.chunk_size >= layout.num_streams:
            return False
        if not self._is_step():
            makes_cache = arguments.get("use_cache") and cache is None and "past_key_values" not in self.parameters
            if makes_cache or arguments.get("cache") is not None:  # in its own way; of continuous batching
                return False
            is_cached = cache is not None or self._wants_cache(arguments.get("use_cache"))
            return not (is_cached and torch.is_grad_enabled())
        if cache is not None or arguments.get("use_cache"):
            raise ValueError(
                "Chunks of streams run twice in training, and a cache would be filled twice: pass `use_cache=False` "
                f"and no cache, or set `stream_chunk_size`, now {streams.chunk_size}, to None."
            )
        return True

    def _run_in_chunks(
        self,
        arguments: dict[str, Any],
        batch_size: int,
        streams: DecoderStreamsProtocol,
        cache_name: str,
        cache: Cache | None,
    ) -> Any:
        """The output of the stock decoder on the rows of all streams; an empty `cache` is filled.

        Raises:
            ValueError: in a replay, another adapter is active than in the forward pass.
        """
        if cache is None:
            arguments = self._without_cache(arguments, batch_size)
        owner = streams.cache_owner
        num_streams = streams.running.layout.num_streams
        waiting: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

        def run(layout: UniformLayout) -> Any:
            if streams.cache_owner != owner:
                raise ValueError(
                    f"Chunks of streams run once more in the backward pass: call `backward` while {describe_owner(owner)} "
                    f"is active, as in the forward pass, not {describe_owner(streams.cache_owner)}, or set "
                    "`stream_chunk_size` to None."
                )
            rows, chunk = _with_rows(arguments, batch_size, layout), streams.running.chunk
            if cache is not None and chunk is not None:
                is_last = chunk.stop == num_streams
                rows[cache_name] = chunk_view(cache, layout, streams.attended_layers, is_last, waiting)
            return self.run_stock(rows)

        return streams.run_in_chunks(run)

    def _without_cache(self, arguments: dict[str, Any], batch_size: int) -> dict[str, Any]:
        """Arguments for chunks that make no cache where all streams at once would make one.

        transformers recognizes packed documents, by their positions, only where there is neither a cache nor a mask.
        """
        if "use_cache" not in self.parameters:
            return arguments
        positions = arguments.get("position_ids")
        would_make_one = self._wants_cache(arguments.get("use_cache"))
        if would_make_one and positions is not None and arguments.get("attention_mask") is None:
            arguments = {**arguments, "attention_mask": positions.new_ones(batch_size, positions.shape[-1])}
        return {**arguments, "use_cache": False}

    def _is_step(self) -> bool:
        """Whether a step of training runs: `generate` may run in training mode, too."""
        return self.decoder.training and torch.is_grad_enabled()

    def _wants_cache(self, use_cache: bool | None, in_chunks: bool = False) -> bool:
        decoder = self.decoder
        if decoder.training and in_chunks and not use_cache:
            return False
        if "past_key_values" not in self.parameters:
            return False
        # The same rule as in transformers' `merge_with_config_defaults`; with a cache, packed documents aren't
        # recognised.
        if decoder.training and getattr(decoder, "gradient_checkpointing", False):
            return False
        return getattr(decoder.config, "use_cache", False) if use_cache is None else use_cache

    def _with_positions(self, arguments: dict[str, Any], num_tokens: int) -> dict[str, Any]:
        """Count positions from the first real token of every sample, as `generate` does, where they aren't given.

        Rotary backbones see differences of positions only and don't care. Prefix keys aren't rotated, so for streams
        the padding on the left of a sample would shift its tokens away from them.
        """
        mask = arguments.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or arguments.get("position_ids") is not None:
            return arguments
        if "position_ids" not in self.parameters:
            return arguments
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_tokens:]
        return {**arguments, "position_ids": positions}

    def _with_lengths(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Tell flash attention the lengths of the documents packed in one row, for which every layer would look, and wait
        for the device, by itself."""
        positions, takes = arguments.get("position_ids"), self.__signature__.parameters.values()
        if not stock_config(self.decoder.config)._attn_implementation.startswith("flash"):
            return arguments
        if positions is None or positions.dim() != 2 or arguments.get("attention_mask") is not None:
            return arguments
        if arguments.get("cu_seq_lens_k") is not None or all(item.kind is not item.VAR_KEYWORD for item in takes):
            return arguments
        return {**arguments, **lengths_of_positions(positions[0])}


def attach_streams(decoder: PreTrainedModel, attention_modules: Iterable[nn.Module]) -> None:
    """Run `decoder` in the streams of its child `parscale`.

    Args:
        decoder: the decoder.
        attention_modules: its modules that call transformers' attention interface; none where streams differ by
            something else than prefixes and attention can't be reached.
    """
    decoder.forward = StreamDoor(decoder, vars(decoder).get("forward"))
    attention_modules = list(attention_modules)
    for module in (decoder, *attention_modules) if attention_modules else ():
        route_through_streams(module, decoder)


def detach_streams(decoder: PreTrainedModel, attention_modules: Iterable[nn.Module]) -> None:
    """Undo [`attach_streams`], also where it stopped half-way."""
    for name in ("forward", "_old_forward"):  # the latter where accelerate's hooks were put around the door
        door = vars(decoder).get(name)
        if isinstance(door, StreamDoor):
            setattr(decoder, name, door.inner or MethodType(type(decoder).forward, decoder))
            if name == "forward" and door.inner is None:
                del decoder.forward
    for module in (decoder, *attention_modules):
        restore_stock_functions(module)


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


def _claimed_cache(arguments: dict[str, Any], streams: DecoderStreamsProtocol) -> tuple[str, Cache | None]:
    """Name and value of the cache that the caller gave; it, or the pages of continuous batching, belong to `streams`."""
    name = next((name for name in _CACHES if isinstance(arguments.get(name), Cache)), "past_key_values")
    cache = arguments.get(name)
    if cache is not None:
        claim_cache(cache, streams.cache_owner)
    if arguments.get("cache") is not None:
        claim_pages(arguments["cache"], streams.cache_owner)
    return name, cache


def _with_rows(arguments: dict[str, Any], batch_size: int, layout: StreamLayout) -> dict[str, Any]:
    """Arguments laid out by row; those of continuous batching, whose one row holds many requests, by token only."""
    is_paged = arguments.get("cache") is not None
    return {
        name: value
        if is_paged and name not in _ARGUMENTS_BY_TOKEN
        else _replicate_rows(name, value, batch_size, layout)
        for name, value in arguments.items()
    }


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


def _marked(output: Any, streams: DecoderStreamsProtocol) -> Any:
    """The output of one stream; a cache that the decoder made itself gets its owner."""
    for item in output if isinstance(output, tuple) else output.values():
        if isinstance(item, Cache):
            mark_cache(item, streams.cache_owner)
    return output


def _mixed(output: Any, streams: DecoderStreamsProtocol, layout: StreamLayout) -> Any:
    """The output of a decoder `[R, T, H]` with the streams mixed to `[B, T, H]`."""
    if isinstance(output, tuple):
        rest = [_caller_cache(item, streams, layout) if isinstance(item, Cache) else item for item in output[1:]]
        return (streams(output[0]), *rest)
    output["last_hidden_state"] = streams(output["last_hidden_state"])
    if output.get("hidden_states") is not None:
        output["hidden_states"] = (*output["hidden_states"][:-1], output["last_hidden_state"])
    for name in _CACHES:
        if isinstance(output.get(name), Cache):
            output[name] = _caller_cache(output[name], streams, layout)
    if output.get("router_logits") is not None and isinstance(layout, UniformLayout):
        # One entry per layer and stream, so that the backbone's balancing loss finds B * T tokens in each.
        output["router_logits"] = tuple(
            stream for layer in output["router_logits"] for stream in layer.chunk(layout.num_streams)
        )
    return output


def _caller_cache(cache: Cache, streams: DecoderStreamsProtocol, layout: StreamLayout) -> Cache:
    """The cache behind a view; one that a decoder without attention made itself gets batch `B`."""
    if viewed_cache(cache) is cache:
        stream_view(cache, layout, frozenset()).hide_streams_of_states()
        mark_cache(cache, streams.cache_owner)
    return viewed_cache(cache)


register_stream_attention()
register_stream_masks()
