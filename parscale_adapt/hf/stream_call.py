"""What the parts of a decoder know of the call in which they run."""

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedConfig

from ..core.layout import StreamLayout, UniformLayout


STREAMS_ATTRIBUTE = "parscale"


@dataclass(frozen=True)
class CacheOwner:
    """Whose keys and values a cache holds.

    Args:
        name: of the adapter, for messages.
        identity: tells an adapter from a later one of the same name; it survives copies of the model and of the cache.
    """

    name: str
    identity: str


CacheOwners = (
    CacheOwner | None | tuple[CacheOwner | None, ...]
)  # None is the plain backbone; a tuple has one per sample


class StreamCall(NamedTuple):
    """One call of a decoder, as its attention and masks see it.

    Args:
        layout: which row is which stream of which sample.
        adapter: whose streams run; None for the plain backbone, and in a mixed batch, whose layout names them.
        num_prefix_tokens: `n` of that adapter.
        chunk: which of that adapter's streams run, where `layout` is that of a few of them; None for all.
    """

    layout: StreamLayout
    adapter: str | None
    num_prefix_tokens: int
    chunk: slice | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the backbone runs as it is: one stream has nothing of its own, but for one of several."""
        return self.layout.num_streams == 1 and self.chunk is None


class DecoderStreamsProtocol(Protocol):
    """What the child `parscale` of a decoder offers.

    `attended_layers` are the layers of a cache whose attention functions get just what `Cache.update` returns, and
    `masks_per_row` says whether the architecture computes with its masks before attention, and so needs one per row.
    """

    attended_layers: Set[int]
    masks_per_row: bool

    @property
    def running(self) -> StreamCall:
        """The call that runs in this thread; between calls, that of the active adapter.

        Gradient checkpointing recomputes layers when their call is over, in a thread of autograd's own.
        """

    @property
    def cache_owner(self) -> CacheOwners:
        """Whose keys and values a cache of the coming call holds."""

    @property
    def chunk_size(self) -> int | None:
        """How many streams run at a time where no cache is continued; None for all."""

    def run_in_chunks(self, run: Callable[[UniformLayout], Any]) -> Any:
        """What `run` gives on the rows of all streams, from running `chunk_size` of them at a time; not where it is None."""

    def open_call(self, batch_size: int, device: torch.device) -> StreamCall:
        """Lay out a batch of `B` samples; `running` is this call until [`close_call`].

        Raises:
            ValueError: the batch has another number of samples than names of adapters were given for.
        """

    def close_call(self) -> None:
        """The call is over, by an exception or not."""

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Mix the streams: `[R, T, H]` to `[B, T, H]`."""


def decoder_streams(config: PreTrainedConfig) -> DecoderStreamsProtocol:
    """The streams behind the configuration that an attention module or a mask function sees."""
    view: Any = config
    return getattr(view.stream_decoder, STREAMS_ATTRIBUTE)
