"""The stock model of vLLM's transformers backend, run in parallel streams.

The streams of a token are rows `[P, T, H]` between the embedding and the aggregator, and heads of one request in attention
and cache. The scheduler knows nothing of them.
"""

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM
from vllm.model_executor.models.transformers.base import VLLM_ATTN_ATTR

from .attention import STREAM_ATTENTION, StreamAttention
from .core.aggregator import AGGREGATORS
from .core.layout import UniformLayout
from .reference import find_reference
from .verification import verify


_NAMES = (
    (r"\.(parscale\.)?prefix_([kv])(\.weight)?$", rf".{VLLM_ATTN_ATTR}.prefix_\2.weight"),
    (r"^.*\.(parscale\.aggregator|aggregate_layer)\.", "aggregator."),
)


class InStreams:
    """Mixin before a causal LM of the transformers backend."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        self.streams: dict[str, Any] = vllm_config.model_config.hf_config.parscale
        self.reference = find_reference(vllm_config.model_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # The backend asks for its own name while it builds; the modules look theirs up when they run.
        self.text_config._attn_implementation = STREAM_ATTENTION
        self.layout = UniformLayout(self.streams["num_streams"])
        with torch.device("cpu"):
            self.aggregator = AGGREGATORS[self.streams["aggregator"]](
                self.text_config.hidden_size, self.streams["num_streams"], self.streams["aggregator_smoothing"]
            )
        self.aggregator.float().to(self.device_config.device).requires_grad_(False)
        self.attention_layers = [module for module in self.modules() if isinstance(module, StreamAttention)]
        self.num_bound = 0
        for layer in self.attention_layers:
            layer.on_bound = self._count_bound

    def _get_attn_cls(self) -> Any:
        if super()._get_attn_cls() is not Attention:
            raise ValueError(
                f"{type(self.model).__name__} has attention of another kind than a decoder's, which can't be served in "
                "streams: use `parscale serve`."
            )
        return partial(
            StreamAttention,
            num_streams=self.streams["num_streams"],
            num_prefix_tokens=self.streams["num_prefix_tokens"],
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Token ids `[T]` or embeddings `[T, H]` to aggregated hidden states `[T, H]`."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        return self.aggregator(self.rows(inputs_embeds, positions, **kwargs))[0]

    def rows(self, inputs_embeds: torch.Tensor, positions: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Embeddings `[T, H]` to the final hidden states of all streams `[P, T, H]`."""
        return self.model(
            inputs_embeds=self.layout.replicate(inputs_embeds[None]),
            position_ids=positions[None],
            use_cache=False,
            return_dict=False,
            **kwargs,
        )[0]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load an export, or new weights into a running engine."""
        # vLLM reads every file of tensors in the folder.
        not_weights = () if self.reference is None else self.reference.tensors.keys()
        loaded = super().load_weights((own_name(name), tensor) for name, tensor in weights if name not in not_weights)
        if self.num_bound:
            self._write_prefixes()
        return loaded

    def _count_bound(self) -> None:
        """Once all layers have a cache, let them have their prefix, and verify what is served."""
        self.num_bound += 1
        if self.num_bound % len(self.attention_layers) or not self.attention_layers[0].has_room:
            return
        if self.reference is not None:
            verify(self, self.reference)
        self._write_prefixes()

    def _write_prefixes(self) -> None:
        for layer in self.attention_layers:
            layer.write_prefix()


def own_name(name: str) -> str:
    """The name here of a tensor in an export, of either layout; those of the backbone keep theirs."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


class ParScaleForCausalLM(InStreams, TransformersForCausalLM):
    """A decoder in streams."""


class ParScaleMoEForCausalLM(InStreams, TransformersMoEForCausalLM):
    """A decoder with experts in streams."""
