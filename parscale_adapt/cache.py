"""A view of any transformers cache in which streams are extra heads.

The cache keeps batch B, so reordering beams, repeating, selecting, cropping and mask sizes stay as they are.
"""

from functools import lru_cache

import torch
from transformers import Cache

from .streams import fold_streams_into_heads


class _StreamFolding:
    """Mixin whose `update` stores `[P * B, h, T, d]` as `[B, P * h, T, d]`."""

    __slots__ = ()

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        key_states = fold_streams_into_heads(key_states, self.num_streams)
        value_states = fold_streams_into_heads(value_states, self.num_streams)
        _check_stored_shape(self, key_states, layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _check_stored_shape(cache: Cache, key_states: torch.Tensor, layer_idx: int) -> None:
    if layer_idx >= len(cache.layers) or not cache.layers[layer_idx].is_initialized:
        return
    stored = cache.layers[layer_idx].keys
    if stored is not None and stored.dim() == 4 and stored.shape[1] != key_states.shape[1]:
        raise ValueError(
            f"`past_key_values` holds {stored.shape[1]} key heads in layer {layer_idx}, the active adapter needs "
            f"{key_states.shape[1]}: the cache was filled under another adapter or number of streams. Start again "
            "from an empty cache after switching adapters."
        )


@lru_cache
def _view_class(cache_class: type[Cache]) -> type[Cache]:
    namespace = {"__slots__": ("num_streams", "viewed"), "__module__": __name__}
    return type(f"StreamView{cache_class.__name__}", (_StreamFolding, cache_class), namespace)


def stream_view(cache: Cache, num_streams: int) -> Cache:
    """A cache object that shares all state with `cache` and folds streams into heads on `update`.

    `update` returns keys and values as `[B, P * h, T, d]`. `view.viewed` is `cache` itself.
    """
    view_class = _view_class(type(cache))
    view = view_class.__new__(view_class)
    view.__dict__ = cache.__dict__
    view.num_streams = num_streams
    view.viewed = cache
    return view


def viewed_cache(cache: Cache | None) -> Cache | None:
    """The caller's cache behind a view, or the argument itself."""
    return cache.viewed if isinstance(cache, _StreamFolding) else cache
