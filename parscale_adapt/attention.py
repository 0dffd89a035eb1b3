"""The prefix inside attention, once for every implementation.

transformers dispatches attention by name. `parscale_sdpa` and its siblings put the prefix of the calling module in
front of its keys and values and hand over to the stock function of that name. Nothing travels through
`past_key_values`, so gradient checkpointing, caches and position ids stay as they are.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


SUPPORTED_IMPLEMENTATIONS = ("eager", "sdpa")
STREAMS_ATTRIBUTE = "parscale"
ARGUMENTS_PER_KEY = ("indices", "block_indices", "position_bias")
_NAME_PREFIX = "parscale_"

AttentionObserver = Callable[[nn.Module, torch.Tensor, torch.Tensor], None]
_observer: ContextVar[AttentionObserver | None] = ContextVar("attention_observer", default=None)


@contextmanager
def observe_attention(observer: AttentionObserver) -> Iterator[None]:
    """Call `observer(module, key, value)` for every attention call inside the block, before any prefix is added."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def route_through_streams(model: PreTrainedModel) -> None:
    """Let `model` call the attention functions of this module; does nothing where it already does.

    Raises:
        ValueError: the model's attention implementation has no counterpart here.
    """
    name = model.config._attn_implementation
    if name is not None and name.startswith(_NAME_PREFIX):
        return
    if name not in SUPPORTED_IMPLEMENTATIONS:
        raise ValueError(
            f"`attn_implementation` must be one of {', '.join(SUPPORTED_IMPLEMENTATIONS)} for streams, got {name!r}: "
            'load the backbone with `attn_implementation="sdpa"`.'
        )
    model.set_attn_implementation(_NAME_PREFIX + name)


def restore_stock_attention(model: PreTrainedModel) -> None:
    """Undo [`route_through_streams`]."""
    name = model.config._attn_implementation
    if name is not None and name.startswith(_NAME_PREFIX):
        model.set_attn_implementation(name.removeprefix(_NAME_PREFIX))


def _stock_function(implementation: str, module: nn.Module) -> Callable:
    if implementation == "eager":
        # Each architecture has its own eager function, which transformers passes only as a default.
        for module_class in type(module).__mro__:
            function = vars(sys.modules[module_class.__module__]).get("eager_attention_forward")
            if function is not None:
                return function
        raise ValueError(
            f"{type(module).__name__} has no eager attention function that streams can call; load the backbone with "
            '`attn_implementation="sdpa"`.'
        )
    return ALL_ATTENTION_FUNCTIONS[implementation]


def _refuse_arguments_per_key(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for name in ARGUMENTS_PER_KEY:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} picks or weighs single keys (`{name}`), which streams don't support: there "
                "is no place for a prefix among them."
            )


def _show_prefix(attention_mask: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """Add `n` visible columns on the left of a `[rows, heads, T, S]` mask."""
    visible = True if attention_mask.dtype == torch.bool else 0.0
    return F.pad(attention_mask, (num_prefix_tokens, 0), value=visible)


def _stream_attention(implementation: str) -> Callable:
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of `query` `[P * B, heads, T, d]`; keys and values come as rows or with folded streams."""
        _refuse_arguments_per_key(module, kwargs)
        stock = _stock_function(implementation, module)
        observer = _observer.get()
        if observer is not None:
            observer(module, key, value)
        streams = getattr(module, STREAMS_ATTRIBUTE, None)
        if streams is None or streams.num_streams == 1:
            return stock(module, query, key, value, attention_mask, **kwargs)

        key, value = streams(key, value)
        num_prefix_tokens = streams.num_prefix_tokens
        if attention_mask is not None:
            attention_mask = _show_prefix(attention_mask, num_prefix_tokens)
            return stock(module, query, key, value, attention_mask, **kwargs)
        if implementation == "eager" or query.shape[-2] == 1:
            return stock(module, query, key, value, None, **kwargs)
        # sdpa's causal flag aligns to the upper left: with n zero queries in front, token t sees prefix and 0..t.
        query = F.pad(query, (0, 0, num_prefix_tokens, 0))
        output, weights = stock(module, query, key, value, None, **kwargs)
        return output[:, num_prefix_tokens:], weights

    return attention


for _implementation in SUPPORTED_IMPLEMENTATIONS:
    AttentionInterface.register(_NAME_PREFIX + _implementation, _stream_attention(_implementation))
    AttentionMaskInterface.register(_NAME_PREFIX + _implementation, ALL_MASK_ATTENTION_FUNCTIONS[_implementation])
