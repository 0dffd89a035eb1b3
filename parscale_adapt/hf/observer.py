"""Looking at the attention calls of a plain model, before any prefix is added."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .attention import refuse_arguments_per_key, stock_function
from .config_view import config_view, stock_config
from .prefixed_attention import SUPPORTED_IMPLEMENTATIONS, AttentionInputs, call_stock


_OBSERVED = "parscale_observed_"


class AttentionObserver:
    """What to do with the calls that [`observe_attention`] sees."""

    def see_mask(self, mask: Any) -> None:
        """transformers made a mask."""

    def see_attention(self, call: AttentionInputs, implementation: str) -> None:
        """The attention function of an implementation was called; queries, keys and values are `[rows, heads, T, size]`."""


_observer: ContextVar[AttentionObserver] = ContextVar("attention_observer")


@contextmanager
def observe_attention(model: PreTrainedModel, observer: AttentionObserver) -> Iterator[None]:
    """Let `observer` see every attention call of `model` inside the block.

    Streams must be off: attention runs as in the plain backbone.
    """
    configs = {
        module: module.config
        for module in model.modules()
        if isinstance(module.__dict__.get("config"), PreTrainedConfig)
    }
    token = _observer.set(observer)
    for module, config in configs.items():
        module.config = config_view(stock_config(config), _OBSERVED)
    try:
        yield
    finally:
        for module, config in configs.items():
            module.config = config
        _observer.reset(token)


def _observed_attention(implementation: str) -> Callable:
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        refuse_arguments_per_key(module, kwargs)
        call = AttentionInputs(
            stock_function(implementation, module), module, query, key, value, attention_mask, kwargs
        )
        _observer.get().see_attention(call, implementation)
        return call_stock(call)

    return attention


def _observed_mask(implementation: str) -> Callable:
    def mask(*args: Any, **kwargs: Any) -> Any:
        made = ALL_MASK_ATTENTION_FUNCTIONS[implementation](*args, **kwargs)
        _observer.get().see_mask(made)
        return made

    return mask


for _implementation in SUPPORTED_IMPLEMENTATIONS:
    AttentionInterface.register(_OBSERVED + _implementation, _observed_attention(_implementation))
    if _implementation in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(_OBSERVED + _implementation, _observed_mask(_implementation))
