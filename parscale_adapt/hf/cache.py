"""A view of any transformers cache in which streams are extra heads.

The cache keeps batch B, so reordering beams, repeating, selecting, cropping and mask sizes stay as they are.
"""

from collections.abc import Callable, Set
from typing import Any

import torch
from torch.nn import functional as F
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from ..core.layout import StreamLayout
from .stream_call import CacheOwners


_OWNER = "parscale_owner"


class _StreamFolding(Cache):
    """Mixin whose `update` stores `[R, h, T, d]` as `[B, P * h, T, d]`; see [`stream_view`] for its fields."""

    __slots__ = ()
    layout: StreamLayout
    attended_layers: Set[int]
    viewed: Cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key_states, value_states = self.layout.to_heads(key_states), self.layout.to_heads(value_states)
        key_states, value_states = self._store(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx in self.attended_layers:
            return key_states, value_states
        # The layer computes its keys and values from what it caches (latent attention, for one) and expects rows.
        return self.layout.to_rows(key_states), self.layout.to_rows(value_states)

    def _store(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The cache's own `update`, of streams as heads."""
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def show_states_as_rows(self) -> None:
        """Lay the states of recurrent layers, which their layers change in place, out by row; on the way in."""
        self._arrange_states(self.layout.to_rows)

    def hide_streams_of_states(self) -> None:
        """Undo [`show_states_as_rows`], so that the cache keeps batch `B`; on the way out."""
        self._arrange_states(self.layout.to_heads)

    def _arrange_states(self, arrange: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                for states in (layer.conv_states, layer.recurrent_states):
                    for index, state in states.items():
                        states[index] = None if state is None else arrange(state)


class _ChunkFolding(_StreamFolding):
    """Mixin with which a chunk of streams reads a prompt into an empty cache; see [`chunk_view`] for its fields.

    The cache is filled once, layer by layer, when the last chunk runs, so that it may be of any kind.
    """

    __slots__ = ()
    is_last: bool
    waiting: dict[int, list[tuple[torch.Tensor, torch.Tensor]]]

    def _store(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.waiting.setdefault(layer_idx, []).append((key_states, value_states))
        if not self.is_last:
            # As long as masks expect them to be: a static cache has places behind the prompt.
            num_empty = self.get_mask_sizes(key_states.shape[-2], layer_idx)[0] - key_states.shape[-2]
            return F.pad(key_states, (0, 0, 0, num_empty)), F.pad(value_states, (0, 0, 0, num_empty))
        num_heads = key_states.shape[1]
        keys, values = (torch.cat(states, dim=1) for states in zip(*self.waiting.pop(layer_idx)))
        keys, values = super()._store(keys, values, layer_idx, *args, **kwargs)
        return keys[:, -num_heads:], values[:, -num_heads:]


def can_be_filled_in_chunks(cache: Cache) -> bool:
    """Whether `cache` is empty, so that a few streams at a time can fill it.

    Raises:
        ValueError: it is, and holds recurrent states.
    """
    if any(_is_filled(layer) for layer in cache.layers):
        return False
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        raise ValueError(
            "A prompt can't be read by a few streams at a time into a cache with recurrent states, which layers change in "
            "place: set `stream_chunk_size` to None."
        )
    return True


def claim_cache(cache: Cache, owner: CacheOwners) -> None:
    """Note whose keys and values `cache` will hold: those of an adapter, (None) of the plain backbone, or (a
    tuple) of one of these for every sample.

    Raises:
        ValueError: it is filled with those of another owner.
    """
    previous = getattr(cache, _OWNER, None)
    if previous == owner:
        return
    if any(_is_filled(layer) for layer in cache.layers):
        raise ValueError(
            f"`past_key_values` was filled by {describe_owner(previous)} and can't be continued by {describe_owner(owner)}: "
            "start again from an empty cache after switching adapters."
        )
    for layer in cache.layers:
        _forget_allocation(layer)
    mark_cache(cache, owner)


def mark_cache(cache: Cache, owner: CacheOwners) -> None:
    """Note whose keys and values `cache` holds, without a check."""
    setattr(cache, _OWNER, owner)


def claim_pages(cache: Any, owner: CacheOwners) -> None:
    """As [`claim_cache`], for the paged cache of continuous batching, which serves one owner for as long as it lives.

    Raises:
        ValueError: it serves another owner.
    """
    previous = vars(cache).setdefault(_OWNER, owner)
    if previous != owner:
        raise ValueError(
            f"The manager of continuous batching serves {describe_owner(previous)} and can't go on with {describe_owner(owner)}: "
            "stop it, or call `destroy_cached_continuous_batching_manager`, before switching adapters."
        )


def _is_filled(layer: CacheLayerMixin | LinearAttentionCacheLayerMixin) -> bool:
    has_states = isinstance(layer, LinearAttentionCacheLayerMixin) and any(layer.has_previous_state.values())
    return has_states or (isinstance(layer, CacheLayerMixin) and bool(layer.get_seq_length() > 0))


def _forget_allocation(layer: CacheLayerMixin | LinearAttentionCacheLayerMixin) -> None:
    """An empty cache may come allocated for another number of heads or rows."""
    layer.is_initialized = False
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for index in layer.conv_states:
            layer.conv_states[index] = layer.recurrent_states[index] = None
            layer.is_conv_states_initialized[index] = layer.is_recurrent_states_initialized[index] = False


def describe_owner(owner: CacheOwners) -> str:
    """The owner as messages name it."""
    if isinstance(owner, tuple):
        return f"a batch of {', '.join(map(describe_owner, owner))}"
    return "the plain backbone" if owner is None else f"the adapter {owner.name!r}"


_cache_view_classes: dict[tuple[type, type], type] = {}  # not `lru_cache`, of which torch.compile warns


def _cache_view_class(folding: type, cache_class: type) -> type:
    if (folding, cache_class) not in _cache_view_classes:
        fields = ("attended_layers", "layout", "viewed", *(("is_last", "waiting") if folding is _ChunkFolding else ()))
        namespace = {"__slots__": fields, "__module__": __name__}
        _cache_view_classes[folding, cache_class] = type(
            f"{folding.__name__.strip('_')}{cache_class.__name__}", (folding, cache_class), namespace
        )
    return _cache_view_classes[folding, cache_class]


def stream_view(cache: Cache, layout: StreamLayout, attended_layers: Set[int]) -> _StreamFolding:
    """A cache object that shares all state with `cache` and folds streams into heads on `update`.

    `update` returns `[B, P * h, T, d]` in `attended_layers`, whose attention functions get just what it returns, and
    `[R, h, T, d]` elsewhere. `view.viewed` is `cache` itself.
    """
    return _view(_StreamFolding, cache, layout, attended_layers)


def chunk_view(
    cache: Cache,
    layout: StreamLayout,
    attended_layers: Set[int],
    is_last: bool,
    waiting: dict[int, list[tuple[torch.Tensor, torch.Tensor]]],
) -> _StreamFolding:
    """A [`stream_view`] of an empty cache for a prompt that a chunk of streams reads.

    Args:
        cache: the cache of all streams.
        layout: of the chunk.
        attended_layers: as in [`stream_view`].
        is_last: whether the chunks of all other streams have read it.
        waiting: what they give to each layer, to share among the views of all chunks.
    """
    view: Any = _view(_ChunkFolding, cache, layout, attended_layers)
    view.is_last, view.waiting = is_last, waiting
    return view


def _view(folding: type, cache: Cache, layout: StreamLayout, attended_layers: Set[int]) -> Any:
    cache_class: Any = type(cache)
    view: Any = object.__new__(_cache_view_class(folding, cache_class))
    view.__dict__ = cache.__dict__
    view.layout = layout
    view.attended_layers = attended_layers
    view.viewed = cache
    return view


def viewed_cache(cache: Cache | None) -> Cache | None:
    """The caller's cache behind a view, or the argument itself."""
    return cache.viewed if isinstance(cache, _StreamFolding) else cache
