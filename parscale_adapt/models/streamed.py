"""Causal LMs that own their streams: the classes of standalone checkpoints.

Such a class is one of the mixins below before a class of transformers. `config.parscale` says how the streams are laid
out; `base_model` is the name of the base model in the causal LM, all other names are relative to it, `""` is itself:

- `num_streams`, `aggregator`, `aggregator_smoothing`, `stream_transform` as in an adapter's configuration, with
  `num_prefix_tokens` (0 without prefixes), `stream_lora_rank` and `stream_lora_alpha`;
- `decoder`, the module whose output is aggregated, and its `hidden_size`;
- `attention_shapes`: key-value heads, key size and value size of every attention module;
- `attended_layers` and `masks_per_row`, as in [`parscale_adapt.hf.decoder`];
- `projection_shapes`: input and output size of every linear layer in which streams differ.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from ..core.aggregator import AGGREGATORS, Aggregator
from ..core.layout import UniformLayout
from ..core.prefix import StreamPrefix
from ..core.transforms import ATTENTION, LINEAR, StreamBias, StreamLora, named_transforms
from ..hf.config_view import stock_config
from ..hf.decoder import attach_streams
from ..hf.paged import init_continuous_batching
from ..hf.stream_call import STREAMS_ATTRIBUTE, CacheOwner, StreamCall


_INIT_STD = 0.02


class OwnedTransforms(nn.Module):
    """What streams differ by at one host.

    Args:
        host: what kind of host, [`ATTENTION`] or [`LINEAR`].
        shape: its sizes.
        streams: `config.parscale`.
    """

    def __init__(self, host: str, shape: Sequence[int], streams: dict[str, Any]):
        super().__init__()
        for kind in named_transforms(streams["stream_transform"], host):
            for name, module in kind.modules(shape, streams):
                self.add_module(name, module)


class OwnedPrefixes(OwnedTransforms):
    """The prefixes of one attention module, as [`parscale_adapt.hf.attention`] asks for them."""

    def forward(
        self, adapter: str, dtype: torch.dtype, chunk: slice | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prefix keys and values `[P, num_key_value_heads, n, key_size or value_size]`."""
        return self.prefix_k(dtype, chunk), self.prefix_v(dtype, chunk)


class OwnedChanges(OwnedTransforms):
    """The low-rank weights and biases at one linear layer."""

    def forward(self, states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Its input `[R, T, in_features]` and its own output to what it gives in every stream."""
        for change in self.children():
            output = output + change(states).to(output.dtype)
        return output


class OwnedStreams(nn.Module):
    """The streams of a decoder, as [`parscale_adapt.hf.decoder`] asks for them; there is no adapter to switch.

    Args:
        streams: `config.parscale`.
    """

    cache_owner = CacheOwner("parscale", "of the checkpoint")
    chunk_size = None  # a checkpoint runs all streams at once

    def __init__(self, streams: dict[str, Any]):
        super().__init__()
        num_streams, smoothing = streams["num_streams"], streams["aggregator_smoothing"]
        self.running = StreamCall(UniformLayout(num_streams), "parscale", streams["num_prefix_tokens"])
        self.attended_layers = frozenset(streams["attended_layers"])
        self.masks_per_row = streams["masks_per_row"]
        self.aggregator = AGGREGATORS[streams["aggregator"]](streams["hidden_size"], num_streams, smoothing)

    def open_call(self, batch_size: int, device: torch.device) -> StreamCall:
        """The same for every batch."""
        return self.running

    def close_call(self) -> None:
        """Nothing to forget."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Mix the streams: `[P * B, T, H]` to `[B, T, H]`."""
        return self.aggregator(hidden_states)


class _Initialized(nn.Module):
    """Mixin that initializes what a checkpoint doesn't hold."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # transformers marks what it has read. Its guard would not see the mark in slices of a parameter.
        was_read = all(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters())
        if isinstance(module, Aggregator | StreamPrefix | StreamLora | StreamBias) and not was_read:
            module.reset_parameters(_INIT_STD)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code from outside, transformers skips modules without parameters of their own; some models initialize
        # the buffers of other modules from there.
        super()._initialize_weights(module)


class StreamedModel(_Initialized):
    """Mixin of a base model that runs in streams; `last_hidden_state` is the aggregated `[batch, tokens, hidden]`."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        add_streams(self)
        self.post_init()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As [`transformers.PreTrainedModel.save_pretrained`], with the configuration behind the decoder's view of it."""
        view = self.config  # type: ignore[has-type]
        self.config = stock_config(view)
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.config = view


class StreamedCausalLM(_Initialized):
    """Mixin of the causal LM over a base model of class `streamed_class`, which is a [`StreamedModel`]."""

    streamed_class: type[StreamedModel]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.run_in_streams()
        self.post_init()

    def run_in_streams(self) -> None:
        """Make the base model, so far a stock one, a [`StreamedModel`]."""
        base_model = self.get_submodule(self.config.parscale["base_model"])
        base_model.__class__ = self.streamed_class
        add_streams(base_model)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """See [`parscale_adapt.hf.paged.init_continuous_batching`]."""
        return init_continuous_batching(self, *args, **kwargs)


def add_streams(base_model: PreTrainedModel) -> None:
    """Give a base model the modules that `config.parscale` describes, and run its decoder in streams.

    They stay in float32 where the rest is in half precision, as PEFT keeps those of an adapter.
    """
    streams = base_model.config.parscale
    decoder = base_model.get_submodule(streams["decoder"])
    decoder.parscale = OwnedStreams(streams)
    attach_streams(decoder, map(base_model.get_submodule, streams["attention_shapes"]))
    if named_transforms(streams["stream_transform"], ATTENTION):
        for name, shape in streams["attention_shapes"].items():
            base_model.get_submodule(name).parscale = OwnedPrefixes(ATTENTION, shape, streams)
    for name, shape in streams["projection_shapes"].items():
        linear = base_model.get_submodule(name)
        linear.parscale = OwnedChanges(LINEAR, shape, streams)
        linear.register_forward_hook(_change_by_stream)
    kept = base_model._keep_in_fp32_modules_strict or ()
    base_model._keep_in_fp32_modules_strict = {*kept, STREAMS_ATTRIBUTE}


def _change_by_stream(linear: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    return linear.parscale(args[0], output)


def inherit_weight_names(config_class: type[PreTrainedConfig], *model_classes: type[PreTrainedModel]) -> None:
    """Let transformers convert tensor names and layouts of these classes as it does for those that they derive from."""
    stock_config: Any = config_class.__base__
    pairs = [(config_class.model_type, stock_config.model_type)]
    pairs += [(model_class.__name__, model_class.__bases__[-1].__name__) for model_class in model_classes]
    for name, stock_name in pairs:
        conversions = get_checkpoint_conversion_mapping(stock_name)
        if conversions is not None:
            register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
