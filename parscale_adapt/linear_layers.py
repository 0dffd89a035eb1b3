"""The PEFT layer beside a linear layer: what it adds to the output in each stream, for every adapter."""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .attention import STREAMS_ATTRIBUTE
from .config import ParScaleConfig
from .layers import DecoderStreams, ParScaleLayer
from .layout import MixedLayout
from .projections import ProjectionShape
from .transforms import StreamBias, StreamLora


class ProjectionStreams(ParScaleLayer):
    """The low-rank weights or biases of each stream at one linear layer.

    The name has no "Linear" in it: PEFT's `target_modules="all-linear"` takes layers by that part of their name.

    Args:
        host: the linear layer.
        shape: sizes of its input and output.
        decoder_streams: knows the layout of the rows.
    """

    adapter_layer_names = ("parscale_transform",)

    def __init__(self, host: nn.Module, shape: ProjectionShape, decoder_streams: DecoderStreams):
        super().__init__(host)
        self.shape = shape
        # Kept out of the module tree, where it has its own place.
        object.__setattr__(self, "_decoder_streams", decoder_streams)
        self.parscale_transform = nn.ModuleDict()

    def update_layer(self, adapter_name: str, config: ParScaleConfig) -> None:
        """Add the transform of one adapter."""
        self.streams_of[adapter_name] = config.num_streams
        transform: StreamLora | StreamBias
        if config.stream_transform == "lora":
            rank, alpha = config.stream_lora_rank, config.stream_lora_alpha
            transform = StreamLora(config.num_streams, *self.shape, rank, alpha)
        else:
            transform = StreamBias(config.num_streams, self.shape.out_features)
        transform.reset_parameters(config.init_std)
        self.parscale_transform[adapter_name] = self._place(transform)

    def forward(self, states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What the linear layer gives in every stream.

        Args:
            states: its input `[R, T, in_features]`.
            output: its own output `[R, T, out_features]`.
        """
        layout = self._decoder_streams.layout
        if not isinstance(layout, MixedLayout):
            adapter = self.current_adapter
            return output if adapter is None else output + self._change(adapter, states, output.dtype)
        output = output.clone()
        for group in layout.groups:
            if group.adapter is not None and group.adapter in self.parscale_transform:
                output[group.rows] += self._change(group.adapter, states[group.rows], output.dtype)
        return output

    def _change(self, adapter: str, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.parscale_transform[adapter](states).to(dtype)


def attach_projection_hook(host: nn.Module) -> RemovableHandle:
    """Let the child module `parscale` of a linear layer add to its output."""
    return host.register_forward_hook(_add_stream_transform)


def _add_stream_transform(host: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return getattr(host, STREAMS_ATTRIBUTE)(args[0], output)
