"""A view of any transformers cache in which streams are extra heads.

The cache keeps batch B, so reordering beams, repeating, selecting, cropping and mask sizes stay as they are.
"""

from functools import lru_cache

from transformers import Cache

from .streams import fold_streams_into_heads


_OWNER = "parscale_owner"


class _StreamFolding:
    """Mixin whose `update` stores `[P * B, h, T, d]` as `[B, P * h, T, d]`."""

    __slots__ = ()

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        key_states = fold_streams_into_heads(key_states, self.num_streams)
        value_states = fold_streams_into_heads(value_states, self.num_streams)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


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
