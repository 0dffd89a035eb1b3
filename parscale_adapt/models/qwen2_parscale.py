"""The authors' published layout (model type `qwen2_parscale`) on today's transformers, without remote code."""

from functools import partial
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen2Config
from transformers import initialization as init
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2ForCausalLM, Qwen2Model

from ..core.aggregator import DynamicAggregator, FeatureProjection
from ..core.layout import UniformLayout
from ..hf.decoder import attach_streams
from ..hf.paged import init_continuous_batching
from ..hf.stream_call import CacheOwner, StreamCall


@strict
class Qwen2ParScaleConfig(Qwen2Config):
    """Qwen2 with the published keys: `parscale_n` streams of `parscale_n_tokens` prefix tokens, smoothed by
    `parscale_attn_smooth`."""

    model_type = "qwen2_parscale"

    parscale_n: int = 1
    parscale_n_tokens: int = 48
    parscale_attn_smooth: float = 0.01


class _DecoderStreams:
    """The streams of a decoder with published weights, a [`DecoderStreamsProtocol`]; there is no adapter to switch."""

    cache_owner = CacheOwner("qwen2_parscale", "of the checkpoint")
    masks_per_row = False
    chunk_size = None  # a checkpoint runs all streams at once

    def __init__(self, decoder: "Qwen2ParScaleModel"):
        config = decoder.config
        self.attended_layers = range(config.num_hidden_layers)
        self.running = StreamCall(UniformLayout(config.parscale_n), "qwen2_parscale", config.parscale_n_tokens)
        self.aggregator = decoder.aggregate_layer

    def open_call(self, batch_size: int, device: torch.device) -> StreamCall:
        return self.running

    def close_call(self) -> None:
        """Nothing to forget."""

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.aggregator(hidden_states)


class Qwen2ParScaleAttention(Qwen2Attention):
    """Qwen2 attention with published prefixes `[P, num_key_value_heads, n, head_dim]`."""

    def __init__(self, config: Qwen2ParScaleConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        shape = (config.parscale_n, config.num_key_value_heads, config.parscale_n_tokens, self.head_dim)
        self.prefix_k = nn.Parameter(torch.empty(shape))
        self.prefix_v = nn.Parameter(torch.empty(shape))

    def parscale(
        self, adapter: str, dtype: torch.dtype, chunk: slice | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prefix keys and values of all streams, which run at once; see [`parscale_adapt.hf.attention`]."""
        return self.prefix_k.to(dtype), self.prefix_v.to(dtype)


def _initialize(module: nn.Module, std: float) -> None:
    if isinstance(module, Qwen2ParScaleAttention):
        init.normal_(module.prefix_k, mean=0.0, std=std)
        init.normal_(module.prefix_v, mean=0.0, std=std)
    elif isinstance(module, FeatureProjection):
        init.normal_(module.weight, mean=0.0, std=std)
        init.zeros_(module.bias)


class Qwen2ParScaleModel(Qwen2Model):
    """Qwen2 in `parscale_n` streams; `last_hidden_state` is the aggregated `[batch, seq_len, hidden_size]`."""

    config_class = Qwen2ParScaleConfig

    def __init__(self, config: Qwen2ParScaleConfig):
        super().__init__(config)
        if config.parscale_n > 1:
            for index, layer in enumerate(self.layers):
                layer.self_attn = Qwen2ParScaleAttention(config, index)
            self.aggregate_layer = DynamicAggregator(
                config.hidden_size, config.parscale_n, config.parscale_attn_smooth
            )
            attach_streams(self, (layer.self_attn for layer in self.layers))
            self.post_init()

    @property
    def parscale(self) -> _DecoderStreams:
        """The streams of this decoder; see [`parscale_adapt.hf.decoder`]."""
        return _DecoderStreams(self)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        _initialize(module, self.config.initializer_range)


class Qwen2ParScaleForCausalLM(Qwen2ForCausalLM):
    """The causal LM over [`Qwen2ParScaleModel`]."""

    config_class = Qwen2ParScaleConfig

    def __init__(self, config: Qwen2ParScaleConfig):
        super().__init__(config)
        self.model = Qwen2ParScaleModel(config)
        self.post_init()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """See [`parscale_adapt.hf.paged.init_continuous_batching`]."""
        is_plain = self.config.parscale_n == 1
        return (super().init_continuous_batching if is_plain else partial(init_continuous_batching, self))(
            *args, **kwargs
        )

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        _initialize(module, self.config.initializer_range)


AutoConfig.register("qwen2_parscale", Qwen2ParScaleConfig, exist_ok=True)
AutoModel.register(Qwen2ParScaleConfig, Qwen2ParScaleModel, exist_ok=True)
AutoModelForCausalLM.register(Qwen2ParScaleConfig, Qwen2ParScaleForCausalLM, exist_ok=True)
