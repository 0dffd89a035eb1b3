"""A view of any transformers cache in which streams are extra heads.

The cache keeps batch B, so reordering beams, repeating, selecting, cropping and mask sizes stay as they are.
"""

from collections.abc import Set
from functools import lru_cache
from typing import Any

import torch
from transformers import Cache

from .streams import fold_streams_into_heads, unfold_streams_from_heads


_OWNER = "parscale_owner"


class _StreamFolding(Cache):
    """Mixin whose `update` stores `[P * B, h, T, d]` as `[B, P * h, T, d]`; see [`stream_view`] for its fields."""

    __slots__ = ()
    num_streams: int
    attended_shapes: Set[tuple[int, int, int]]
    viewed: Cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (key_states.shape[1], key_states.shape[-1], value_states.shape[-1])
        key_states = fold_streams_into_heads(key_states, self.num_streams)
        value_states = fold_streams_into_heads(value_states, self.num_streams)
        key_states, value_states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if shape in self.attended_shapes:
            return key_states, value_states
        # The layer computes its keys and values from what it caches (latent attention) and expects rows.
        return self._rows(key_states), self._rows(value_states)

    def _rows(self, states: torch.Tensor) -> torch.Tensor:
        return unfold_streams_from_heads(states, self.num_streams).flatten(0, 1)


def claim_cache(cache: Cache, owner: str | None) -> None:
    """Note whose keys and values `cache` will hold: those of the adapter `owner`, or (None) of the plain backbone.

    Raises:
        ValueError: it is filled with those of another owner.
    """
    previous = getattr(cache, _OWNER, None)
    if previous == owner:
        return
    if cache.get_seq_length() > 0:
        raise ValueError(
            f"`past_key_values` was filled by {_describe(previous)} and can't be continued by {_describe(owner)}: "
            "start again from an empty cache after switching adapters."
        )
    for layer in cache.layers:
        layer.is_initialized = False  # an empty static cache may come allocated for another number of heads
    setattr(cache, _OWNER, owner)


def _describe(owner: str | None) -> str:
    return "the plain backbone" if owner is None else f"the adapter {owner!r}"


@lru_cache
def _view_class(cache_class: type) -> type:
    namespace = {"__slots__": ("attended_shapes", "num_streams", "viewed"), "__module__": __name__}
    return type(f"StreamView{cache_class.__name__}", (_StreamFolding, cache_class), namespace)


def stream_view(cache: Cache, num_streams: int, attended_shapes: Set[tuple[int, int, int]]) -> Cache:
    """A cache object that shares all state with `cache` and folds streams into heads on `update`.

    `update` returns `[B, P * h, T, d]` where (heads, key size, value size) is among `attended_shapes`, those that
    reach the attention function, and `[P * B, h, T, d]` elsewhere. `view.viewed` is `cache` itself.
    """
    cache_class: Any = type(cache)
    view: Any = object.__new__(_view_class(cache_class))
    view.__dict__ = cache.__dict__
    view.num_streams = num_streams
    view.attended_shapes = attended_shapes
    view.viewed = cache
    return view


def viewed_cache(cache: Cache | None) -> Cache | None:
    """The caller's cache behind a view, or the argument itself."""
    return cache.viewed if isinstance(cache, _StreamFolding) else cache
