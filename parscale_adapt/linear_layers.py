"""The PEFT layer beside a linear layer: what it adds to the output in each stream, for every adapter."""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .attention import STREAMS_ATTRIBUTE
from .config import ParScaleConfig
from .layers import ParScaleLayer
from .projections import ProjectionShape
from .transforms import StreamBias, StreamLora


class ProjectionStreams(ParScaleLayer):
    """The low-rank weights or biases of each stream at one linear layer.

    The name has no "Linear" in it: PEFT's `target_modules="all-linear"` takes layers by that part of their name.

    Args:
        host: the linear layer.
        shape: sizes of its input and output.
    """

    adapter_layer_names = ("parscale_transform",)

    def __init__(self, host: nn.Module, shape: ProjectionShape):
        super().__init__(host)
        self.shape = shape
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
        """Add the active adapter's transform of `states` `[P * B, T, in_features]` to the linear layer's `output`."""
        change = self.parscale_transform[self.current_adapter](states)
        return output + change.to(output.dtype)


def attach_projection_hook(host: nn.Module) -> RemovableHandle:
    """Let the child module `parscale` of a linear layer add to its output."""
    return host.register_forward_hook(_add_stream_transform)


def _add_stream_transform(host: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
    streams = getattr(host, STREAMS_ATTRIBUTE)
    return None if streams.current_adapter is None else streams(args[0], output)
