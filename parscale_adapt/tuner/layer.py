"""PEFT layers: where prefixes, aggregators and the transforms of linear layers live, for every adapter."""

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..core.aggregator import AGGREGATORS
from ..core.layout import MixedLayout, UniformLayout
from ..core.transforms import ATTENTION, LINEAR, STREAM_TRANSFORMS, named_transforms
from ..hf.backbone import AttentionShape, Backbone
from ..hf.engines import execution_device
from ..hf.projections import ProjectionShape
from ..hf.replay_room import ReplayRoom
from ..hf.stream_call import STREAMS_ATTRIBUTE, CacheOwner, CacheOwners, StreamCall
from ..hf.stream_chunks import run_in_chunks
from .config import ParScaleConfig
from .registration import PARAMETER_PREFIX
from .thread_batch import (
    ThreadBatch,
    adapters_of_thread,
    chunk_of_thread,
    forget_layout,
    lay_out_mixed,
    layout_of_thread,
)


_COUNTING = threading.Lock()


class ParScaleLayer(nn.Module, BaseTunerLayer):
    """What both layers share: the number of streams of each adapter, and which adapter is active.

    A layer is a child named `parscale` of the module that it serves; the backbone's own modules stay what they are.
    """

    other_param_names: tuple[str, ...] = ("streams_of",)

    def __init__(self, host: nn.Module):
        super().__init__()
        self.streams_of: dict[str, int] = {}
        # Kept out of the module tree: the host is this module's parent.
        object.__setattr__(self, "_host", host)
        object.__setattr__(self, "_neighbor", host)  # whose device the tensors share
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    @property
    def current_adapter(self) -> str | None:
        """The adapter whose streams run now, None for the plain backbone."""
        if self._disable_adapters:
            return None
        return next((name for name in self.active_adapters if name in self.streams_of), None)

    @property
    def num_streams(self) -> int:
        """P of the adapter whose streams run now; 1 for the plain backbone."""
        adapter = self.current_adapter
        return 1 if adapter is None else self.streams_of[adapter]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, None]:
        # PEFT looks for `weight` on the layer that an adapter replaces; these layers stand beside their host.
        return execution_device(self._neighbor), None

    def _place(self, module: nn.Module) -> nn.Module:
        """Move a new module to where the host computes and, if that is a float type, the host's dtype."""
        if any(parameter.is_meta for parameter in module.parameters()):
            return module
        dtype = next(self._host.parameters()).dtype
        return module.to(execution_device(self._neighbor), dtype if dtype.is_floating_point else None)


def _containers(host_kind: str) -> tuple[str, ...]:
    kinds = [kind for kind in STREAM_TRANSFORMS.values() if kind.host == host_kind]
    return tuple(f"{PARAMETER_PREFIX}{part}" for kind in kinds for part in kind.parts())


class HostStreams(ParScaleLayer):
    """What the streams of every adapter differ by at one host: a dictionary for each part of each transform that can
    stand there.

    Args:
        host: an attention module or a linear layer.
        shape: its sizes.
    """

    host_kind: ClassVar[str]

    def __init__(self, host: nn.Module, shape: AttentionShape | ProjectionShape):
        super().__init__(host)
        self.shape = shape
        for container in self.adapter_layer_names:
            self.add_module(container, nn.ModuleDict())

    def update_layer(self, adapter_name: str, config: ParScaleConfig) -> None:
        """Add what the streams of one adapter differ by here."""
        self.streams_of[adapter_name] = config.num_streams
        settings = dict(vars(config))
        if config.is_being_loaded:  # plain, as in the file
            settings["init_weights"] = "normal"
        for kind in named_transforms(config.stream_transform, self.host_kind):
            for part, module in kind.modules(self.shape, settings):
                module.reset_parameters(config.init_std)
                getattr(self, f"{PARAMETER_PREFIX}{part}")[adapter_name] = self._place(module)


class AttentionStreams(HostStreams):
    """The prefixes of one attention module."""

    host_kind = ATTENTION
    adapter_layer_names = _containers(ATTENTION)

    @torch.no_grad()
    def start_from(self, adapter_name: str, key: torch.Tensor, value: torch.Tensor) -> None:
        """Let the prefixes of one adapter start as `key` and `value` `[P, num_key_value_heads, n, size]`."""
        self.parscale_prefix_k[adapter_name].weight.copy_(key)
        self.parscale_prefix_v[adapter_name].weight.copy_(value)

    def forward(
        self, adapter: str, dtype: torch.dtype, chunk: slice | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Prefix keys and values `[P, num_key_value_heads, n, key_size or value_size]` of one adapter, if it has any; of
        the streams of a chunk only, where one is given."""
        if adapter not in self.parscale_prefix_k:
            return None
        return self.parscale_prefix_k[adapter](dtype, chunk), self.parscale_prefix_v[adapter](dtype, chunk)


class DecoderStreams(ParScaleLayer):
    """The aggregators of one decoder; a [`DecoderStreamsProtocol`].

    Args:
        host: the decoder.
        backbone: what is known of it.
        output_module: what computes its final hidden states, which may be on another device than its first layers.
    """

    adapter_layer_names = ("parscale_aggregator",)
    other_param_names = ("streams_of", "prefix_tokens_of", "cache_owner_of", "chunk_size_of")

    def __init__(self, host: nn.Module, backbone: Backbone, output_module: nn.Module):
        super().__init__(host)
        object.__setattr__(self, "_neighbor", output_module)
        self.hidden_size = backbone.hidden_size
        self.attended_layers = backbone.attended_layers
        self.masks_per_row = backbone.masks_per_row
        self.is_open = False  # whether the decoder's calls come through here
        self.replay_room = ReplayRoom()
        self.logits_hook: RemovableHandle | None = None  # tells it what the loss takes
        self.parscale_aggregator = nn.ModuleDict()
        self.prefix_tokens_of: dict[str, int] = {}
        self.cache_owner_of: dict[str, CacheOwner] = {}
        self.chunk_size_of: dict[str, int | None] = {}
        self._batch = ThreadBatch()
        self._num_mixing = self._num_chunking = 0

    def update_layer(self, adapter_name: str, config: ParScaleConfig) -> None:
        """Add the aggregator of one adapter; one stream needs none."""
        self.streams_of[adapter_name] = config.num_streams
        self.cache_owner_of[adapter_name] = CacheOwner(adapter_name, uuid.uuid4().hex)
        self.chunk_size_of[adapter_name] = config.stream_chunk_size
        has_prefix = config.num_streams > 1 and named_transforms(config.stream_transform, ATTENTION)
        self.prefix_tokens_of[adapter_name] = config.num_prefix_tokens if has_prefix else 0
        if config.num_streams > 1:
            aggregator_class = AGGREGATORS[config.aggregator]
            aggregator = aggregator_class(self.hidden_size, config.num_streams, config.aggregator_smoothing)
            aggregator.reset_parameters(config.init_std)
            self.parscale_aggregator[adapter_name] = self._place(aggregator)

    @property
    def running(self) -> StreamCall:
        """See [`DecoderStreamsProtocol`]."""
        if self._num_mixing:
            layout = layout_of_thread(self._batch)
            if layout is not None:
                return StreamCall(layout, None, 0)
        adapter = self.current_adapter
        num_prefix_tokens = 0 if adapter is None else self.prefix_tokens_of[adapter]
        chunk = chunk_of_thread(self._batch) if self._num_chunking else None
        num_streams = self.num_streams if chunk is None else chunk.stop - chunk.start
        return StreamCall(UniformLayout(num_streams), adapter, num_prefix_tokens, chunk)

    @property
    def chunk_size(self) -> int | None:
        """See [`DecoderStreamsProtocol`]."""
        adapter = self.current_adapter
        return None if adapter is None else self.chunk_size_of[adapter]

    def run_in_chunks(self, run: Callable[[UniformLayout], Any]) -> Any:
        """See [`DecoderStreamsProtocol`]."""
        assert self.chunk_size is not None
        return run_in_chunks(run, self._host, self._running_chunk, self.num_streams, self.chunk_size, self.replay_room)

    @contextmanager
    def _running_chunk(self, chunk: slice) -> Iterator[None]:
        before, self._batch.chunk = self._batch.chunk, chunk
        with _COUNTING:
            self._num_chunking += 1
        try:
            yield
        finally:
            with _COUNTING:
                self._num_chunking -= 1
            self._batch.chunk = before

    @property
    def cache_owner(self) -> CacheOwners:
        """See [`DecoderStreamsProtocol`]."""
        adapters = adapters_of_thread(self._batch) if self._num_mixing else None
        if adapters is not None:
            return tuple(None if name is None else self.cache_owner_of[name] for name in adapters)
        adapter = self.current_adapter
        return None if adapter is None else self.cache_owner_of[adapter]

    @contextmanager
    def mixed_batches(self, adapters: Sequence[str | None], may_repeat: bool) -> Iterator[None]:
        """Inside the block, in this thread, every sample runs an adapter of its own.

        Args:
            adapters: the adapter of every sample, None for the plain backbone.
            may_repeat: a batch several times as large repeats each sample, as `generate` does for beams.
        """
        before = dict(vars(self._batch))
        self._batch.adapters = tuple(name if name in self.streams_of else None for name in adapters)
        self._batch.may_repeat, self._batch.layout = may_repeat, None
        with _COUNTING:  # `torch.compile` guards on this number, and not on what a thread keeps for itself
            self._num_mixing += 1
        try:
            yield
        finally:
            with _COUNTING:
                self._num_mixing -= 1
            vars(self._batch).clear()
            vars(self._batch).update(before)

    def open_call(self, batch_size: int, device: torch.device) -> StreamCall:
        """See [`DecoderStreamsProtocol`].

        Raises:
            ValueError: the batch has another number of samples than [`mixed_batches`] names adapters.
        """
        if self._num_mixing:
            lay_out_mixed(self._batch, self.streams_of, batch_size, device)
        return self.running

    def close_call(self) -> None:
        """See [`DecoderStreamsProtocol`]."""
        if self._num_mixing:
            forget_layout(self._batch)

    def adapters_of_rows(self, num_rows: int) -> tuple[str | None, ...] | None:
        """In a batch that mixes adapters, the one of every row: inside the decoder R rows, outside of it B."""
        adapters = adapters_of_thread(self._batch) if self._num_mixing else None
        if adapters is None:
            return None
        layout = layout_of_thread(self._batch)
        if layout is not None:
            return layout.adapter_of_row
        return tuple(name for name in adapters for _ in range(num_rows // len(adapters)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Mix the streams: `[R, T, H]` to `[B, T, H]`."""
        layout, adapter, *_ = self.running
        if isinstance(layout, UniformLayout):
            return self.parscale_aggregator[adapter](hidden_states)
        mixed = hidden_states.new_empty(len(layout.adapters), *hidden_states.shape[1:])
        for group in layout.groups:
            states = hidden_states[group.rows]
            is_plain = group.num_streams == 1
            mixed[group.samples] = states if is_plain else self.parscale_aggregator[group.adapter](states)
        return mixed


class ProjectionStreams(HostStreams):
    """The low-rank weights and biases of each stream at one linear layer.

    The name has no "Linear" in it: PEFT's `target_modules="all-linear"` takes layers by that part of their name.

    Args:
        host: the linear layer.
        shape: sizes of its input and output.
        decoder_streams: knows the layout of the rows.
    """

    host_kind = LINEAR
    adapter_layer_names = _containers(LINEAR)

    def __init__(self, host: nn.Module, shape: ProjectionShape, decoder_streams: DecoderStreams):
        super().__init__(host, shape)
        # Kept out of the module tree, where it has its own place.
        object.__setattr__(self, "_decoder_streams", decoder_streams)
        self._hook: RemovableHandle | None = None

    def attach_hook(self) -> None:
        """Let the linear layer's output pass through here."""
        self._hook = self._hook or self._host.register_forward_hook(_add_stream_transform)

    def detach_hook(self) -> None:
        """Undo [`attach_hook`]."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def forward(self, states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What the linear layer gives in every stream.

        Args:
            states: its input `[R, T, in_features]`.
            output: its own output `[R, T, out_features]`.
        """
        running = self._decoder_streams.running
        layout = running.layout
        if not isinstance(layout, MixedLayout):
            adapter = self.current_adapter
            return output if adapter is None else self._changed(adapter, states, output, running.chunk)
        changed = output.clone()
        for group in layout.groups:
            if group.adapter is not None and group.adapter in self.streams_of:
                changed[group.rows] = self._changed(group.adapter, states[group.rows], output[group.rows])
        return changed

    def _changed(
        self, adapter: str, states: torch.Tensor, output: torch.Tensor, chunk: slice | None = None
    ) -> torch.Tensor:
        for container in self.adapter_layer_names:
            modules = getattr(self, container)
            if adapter in modules:
                output = output + modules[adapter](states, chunk).to(output.dtype)
        return output


def _add_stream_transform(host: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return getattr(host, STREAMS_ATTRIBUTE)(args[0], output)
