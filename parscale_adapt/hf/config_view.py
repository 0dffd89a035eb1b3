"""A view of a model's configuration in which the attention implementation has another name.

transformers looks up attention and mask functions by `config._attn_implementation`. Attention modules and the decoder
get a view of their configuration that adds a prefix to that name; the model's own configuration keeps the stock name,
which generation, continuous batching and trainers know.
"""

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


# Functions are registered for the whole process. Named after their module, they leave those of checkpoints that bring
# their own code, in whatever version, alone.
STREAMS = f"{__name__}."


class _View:
    """Mixin of a view's class; see [`config_view`] for its fields."""

    __slots__ = ()
    viewed: PreTrainedConfig
    name_prefix: str
    stream_decoder: nn.Module | None

    @property
    def _attn_implementation(self) -> str | None:
        name = self.viewed._attn_implementation
        return None if name is None else self.name_prefix + name

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self.viewed._attn_implementation = value

    def __copy__(self) -> PreTrainedConfig:
        # With fields of its own: from a copy, transformers takes away what differs by layer.
        return config_view(copy.copy(self.viewed), self.name_prefix, self.stream_decoder)

    def __deepcopy__(self, memo: dict[int, Any]) -> PreTrainedConfig:
        viewed, decoder = copy.deepcopy(self.viewed, memo), memo.get(id(self.stream_decoder))
        # A view is copied with its decoder only, never the other way: a copy of the configuration has no weights.
        return viewed if decoder is None else config_view(viewed, self.name_prefix, decoder)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return config_view, (self.viewed, self.name_prefix, self.stream_decoder)


@lru_cache
def _config_view_class(config_class: type) -> type:
    namespace = {"__slots__": ("name_prefix", "stream_decoder", "viewed"), "__module__": __name__}
    return type(f"ViewOf{config_class.__name__}", (_View, config_class), namespace)


def config_view(config: PreTrainedConfig, name_prefix: str, decoder: nn.Module | None = None) -> PreTrainedConfig:
    """A configuration that shares all fields with `config`; `name_prefix` stands before its attention implementation.

    `view.viewed` is `config` itself, `view.stream_decoder` the decoder whose streams run there.
    """
    config_class: Any = type(config)
    view: Any = object.__new__(_config_view_class(config_class))
    for name, value in {"__dict__": config.__dict__, "viewed": config, "name_prefix": name_prefix}.items():
        object.__setattr__(view, name, value)
    object.__setattr__(view, "stream_decoder", decoder)
    return view


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration behind a view, or the argument itself."""
    return config.viewed if isinstance(config, _View) else config
