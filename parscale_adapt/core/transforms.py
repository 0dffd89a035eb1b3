"""What makes streams differ: prefixes, low-rank weights or biases per stream (paper, Appendix A, Table 6).

Prefixes stand in attention modules; the other two add to the output of a linear layer. One class describes each kind,
and whatever a configuration names is a sequence of them: the forward, saving, growing and exporting know none by name.
Shapes as in [`parscale_adapt.core.streams`].
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from .prefix import ReparameterizedPrefix, StreamPrefix
from .streams import streams_of_chunk


ATTENTION, LINEAR = "attention", "linear"


class StreamLora(nn.Module):
    """Low-rank weights per stream (LoRA, Hu et al., 2021): adds `alpha / rank * B_p A_p x` in stream p.

    `B` starts at zero, so that all streams start as the backbone; since each has an `A` of its own, their gradients
    differ from the first step on.

    Args:
        num_streams: `P`.
        in_features, out_features: sizes of the linear layer's input and output.
        rank: rows of `A`.
        alpha: numerator of the scale.
    """

    def __init__(self, num_streams: int, in_features: int, out_features: int, rank: int, alpha: float):
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(num_streams, rank, in_features))
        self.lora_B = nn.Parameter(torch.empty(num_streams, out_features, rank))
        self.scaling = alpha / rank

    def reset_parameters(self, init_std: float) -> None:
        """`A` uniform as in PEFT's LoRA, `B` at zero."""
        with torch.no_grad():
            for matrix in self.lora_A:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, states: torch.Tensor, chunk: slice | None = None) -> torch.Tensor:
        """What to add to the output `[P * B, T, out_features]` of an input `[P * B, T, in_features]`.

        Args:
            states: the input.
            chunk: the streams that it has, `P` less than all.
        """
        lora_a, lora_b = streams_of_chunk(self.lora_A, chunk), streams_of_chunk(self.lora_B, chunk)
        by_stream = states.reshape(lora_a.shape[0], -1, states.shape[-1])
        if not torch.is_autocast_enabled(states.device.type):
            by_stream = by_stream.to(lora_a.dtype)
        change = by_stream @ lora_a.mT @ lora_b.mT * self.scaling
        return change.view(*states.shape[:-1], -1)


class StreamBias(nn.Module):
    """A bias per stream (BitFit, Ben Zaken et al., 2021).

    Args:
        num_streams: `P`.
        out_features: size of the linear layer's output.
    """

    def __init__(self, num_streams: int, out_features: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(num_streams, out_features))

    def reset_parameters(self, init_std: float) -> None:
        """From N(0, `init_std`), so that the streams differ from the start."""
        nn.init.normal_(self.bias, std=init_std)

    def forward(self, states: torch.Tensor, chunk: slice | None = None) -> torch.Tensor:
        """What to add to an output of `P * B` rows: `[P * B, 1, out_features]`.

        Args:
            states: the input, whose rows count.
            chunk: the streams that it has, `P` less than all.
        """
        bias = streams_of_chunk(self.bias, chunk)
        return bias.repeat_interleave(states.shape[0] // bias.shape[0], dim=0)[:, None]


class StreamTransform:
    """One kind of difference between streams.

    Attributes:
        host: which modules of the backbone it stands beside, [`ATTENTION`] modules or [`LINEAR`] layers.
        fields: the settings of a configuration that only it reads.
        tensors: names of its tensors in an adapter file, behind `<host>.parscale_`, and in its modules. The first
            dimension of each is `P`.
    """

    host: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    tensors: ClassVar[dict[str, str]]

    @classmethod
    def parts(cls) -> tuple[str, ...]:
        """Names of its modules at one host."""
        return tuple(dict.fromkeys(place.partition(".")[0] for place in cls.tensors.values()))

    @staticmethod
    def modules(shape: Sequence[int], settings: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
        """Its modules at one host, by name; each has `reset_parameters`, to be called before the next one is made.

        Args:
            shape: of an attention module, key-value heads, key size and value size; of a linear layer, input and output
                size.
            settings: fields of a configuration.
        """
        raise NotImplementedError


class PrefixTransform(StreamTransform):
    """Prefix keys and values in every attention module, the paper's choice."""

    host = ATTENTION
    fields = ("num_prefix_tokens", "init_weights")
    tensors: ClassVar[dict[str, str]] = {"prefix_k": "prefix_k.weight", "prefix_v": "prefix_v.weight"}

    @staticmethod
    def modules(shape: Sequence[int], settings: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
        """[`StreamPrefix`] or, while they train so, [`ReparameterizedPrefix`]."""
        num_heads, key_size, value_size = shape
        is_reparameterized = settings.get("init_weights") == "reparameterized"
        prefix_class = ReparameterizedPrefix if is_reparameterized else StreamPrefix
        for name, size in (("prefix_k", key_size), ("prefix_v", value_size)):
            yield name, prefix_class((settings["num_streams"], num_heads, settings["num_prefix_tokens"], size))


class LoraTransform(StreamTransform):
    """Low-rank weights in every linear layer."""

    host = LINEAR
    fields = ("stream_lora_rank", "stream_lora_alpha")
    tensors: ClassVar[dict[str, str]] = {"lora_A": "lora.lora_A", "lora_B": "lora.lora_B"}

    @staticmethod
    def modules(shape: Sequence[int], settings: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
        """[`StreamLora`]."""
        in_features, out_features = shape
        rank, alpha = settings["stream_lora_rank"], settings["stream_lora_alpha"]
        yield "lora", StreamLora(settings["num_streams"], in_features, out_features, rank, alpha)


class BitfitTransform(StreamTransform):
    """A bias in every linear layer."""

    host = LINEAR
    fields = ()
    tensors: ClassVar[dict[str, str]] = {"bias": "bias.bias"}

    @staticmethod
    def modules(shape: Sequence[int], settings: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
        """[`StreamBias`]."""
        yield "bias", StreamBias(settings["num_streams"], shape[1])


STREAM_TRANSFORMS: dict[str, type[StreamTransform]] = {
    "prefix": PrefixTransform,
    "lora": LoraTransform,
    "bitfit": BitfitTransform,
}
STREAM_TENSORS = {name: place for kind in STREAM_TRANSFORMS.values() for name, place in kind.tensors.items()}


def named_transforms(
    stream_transform: str | Sequence[str], host: str | None = None
) -> tuple[type[StreamTransform], ...]:
    """What `stream_transform` of a configuration names, one or several; with `host`, those that stand there."""
    names = [stream_transform] if isinstance(stream_transform, str) else stream_transform
    kinds = (STREAM_TRANSFORMS[name] for name in names)
    return tuple(kind for kind in kinds if host in (None, kind.host))
