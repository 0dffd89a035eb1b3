"""What the cost formulas need to know of a backbone, taken from the paper's sizes or from any transformers config."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .parameter_count import PAPER_PREFIX_TOKENS, PAPER_SHAPES, Qwen2Shape, adapter_parameters, backbone_parameters


@dataclass(frozen=True)
class BackboneShape:
    """Sizes and weight counts of a decoder-only backbone. Widths are real numbers, so that a shape can be scaled.

    Attributes:
        name: how tables call it.
        num_layers: decoder layers.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the MLP.
        query_size: width of one token's queries in one layer.
        key_value_size: width of one token's keys in one layer.
        attention_weights: matrix entries of one layer's attention.
        mlp_weights: matrix entries of one layer's MLP.
        vector_weights: entries of norms (and biases) in one layer.
        final_weights: entries outside layers and embeddings, such as the last norm.
        vocab_size: rows of the output layer.
        embedding_weights: entries of all embeddings and of an output layer of its own.
        num_params: N, the non-embedding parameters.
    """

    name: str
    num_layers: int
    hidden_size: float
    intermediate_size: float
    query_size: float
    key_value_size: float
    attention_weights: float
    mlp_weights: float
    vector_weights: float
    final_weights: float
    vocab_size: int
    embedding_weights: float
    num_params: float

    def params_with_streams(self, num_streams: int, num_prefix_tokens: int = PAPER_PREFIX_TOKENS) -> float:
        """Non-embedding parameters of backbone and adapter, the N that the scaling law is fitted to."""
        return self.num_params + adapter_parameters(
            num_layers=self.num_layers,
            hidden_size=round(self.hidden_size),
            key_value_size=round(self.key_value_size),
            num_streams=num_streams,
            num_prefix_tokens=num_prefix_tokens,
        )

    def scaled_to(self, num_params: float) -> "BackboneShape":
        """The same backbone at another width with `num_params` parameters: equal depth, number of heads and vocabulary.

        This is how the paper's six sizes differ. Matrices grow with the square of the width, the rest linearly.
        """
        if not num_params > 0:
            raise ValueError(f"a backbone needs a positive number of parameters, got {num_params:g}")
        square = self.num_layers * (self.attention_weights + self.mlp_weights)
        linear = self.num_params - square
        width = (math.sqrt(linear**2 + 4 * square * num_params) - linear) / (2 * square)
        return replace(
            self,
            name=f"{self.name} widened to {num_params / 1e9:.2f}B",
            hidden_size=self.hidden_size * width,
            intermediate_size=self.intermediate_size * width,
            query_size=self.query_size * width,
            key_value_size=self.key_value_size * width,
            attention_weights=self.attention_weights * width**2,
            mlp_weights=self.mlp_weights * width**2,
            vector_weights=self.vector_weights * width,
            final_weights=self.final_weights * width,
            embedding_weights=self.embedding_weights * width,
            num_params=num_params,
        )


def published_shape(name: str, shape: Qwen2Shape) -> BackboneShape:
    """A Qwen2-type shape as the authors' cost script sees it: that script leaves the biases out of the weights."""
    hidden, key_value = shape.hidden_size, shape.key_value_size
    return BackboneShape(
        name=name,
        num_layers=shape.num_layers,
        hidden_size=hidden,
        intermediate_size=shape.intermediate_size,
        query_size=hidden,
        key_value_size=key_value,
        attention_weights=2 * hidden * hidden + 2 * hidden * key_value,
        mlp_weights=3 * hidden * shape.intermediate_size,
        vector_weights=2 * hidden,
        final_weights=hidden,
        vocab_size=shape.vocab_size,
        embedding_weights=shape.vocab_size * hidden,
        num_params=backbone_parameters(shape),
    )


def load_shape(model: str) -> BackboneShape:
    """A shape by the name of one of the paper's sizes (such as `1.6B`), or from a transformers config file or folder.

    Raises:
        ValueError: there is no such config, or the formulas do not cover its architecture.
    """
    if model in PAPER_SHAPES:
        return published_shape(model, PAPER_SHAPES[model])
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"`{model}` is neither one of the paper's sizes ({', '.join(PAPER_SHAPES)}) "
            "nor a config.json or a folder that holds one"
        )
    return shape_of_config(_read_config(file), path.resolve().name if path.is_dir() else path.resolve().parent.name)


def _read_config(file: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(file), trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"transformers cannot read {file} as a model config: {reason}") from error


def shape_of_config(config: Any, name: str) -> BackboneShape:
    """Measure a transformers config by building its model on the meta device, which allocates nothing.

    Args:
        config: a `transformers.PreTrainedConfig` of a decoder-only language model.
        name: how tables call it.

    Raises:
        ValueError: the architecture is not a stack of attention and dense MLP, which is what the formulas describe.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = config.get_text_config()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ValueError(f"{name} ({config.model_type}) is not a causal language model of transformers") from error
    layers = _find_layers(model, config, name)
    attention, mlp, vectors = (sum(counts) / len(layers) for counts in zip(*[_count_layer(x, name) for x in layers]))
    embeddings = _embedding_parameters(model)
    hidden = config.hidden_size
    num_params = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    return BackboneShape(
        name=name,
        num_layers=len(layers),
        hidden_size=hidden,
        intermediate_size=_intermediate_size(layers[0], hidden),
        query_size=config.num_attention_heads * _head_dim(config),
        key_value_size=_key_value_size(config, attention, name),
        attention_weights=attention,
        mlp_weights=mlp,
        vector_weights=vectors,
        final_weights=num_params - len(layers) * (attention + mlp + vectors),
        vocab_size=model.get_output_embeddings().weight.shape[0],
        embedding_weights=sum(embeddings.values()),
        num_params=num_params,
    )


def _find_layers(model: Any, config: Any, name: str) -> Any:
    from torch.nn import ModuleList

    for module in model.modules():
        if isinstance(module, ModuleList) and len(module) == config.num_hidden_layers:
            return module
    raise ValueError(f"{name} ({config.model_type}) has no list of {config.num_hidden_layers} decoder layers")


def _attention_modules(layer: Any) -> Iterator[Any]:
    return (module for module in layer.modules() if "Attention" in type(module).__name__)


def _count_layer(layer: Any, name: str) -> tuple[int, int, int]:
    """Matrix entries of attention and of the MLP, and entries of vectors."""
    inside = {id(parameter) for module in _attention_modules(layer) for parameter in module.parameters()}
    parameters = list(layer.parameters())
    if not inside or any(parameter.dim() > 2 for parameter in parameters):
        raise ValueError(
            f"{name} has a layer without attention or with stacked experts; the published formulas only describe "
            "attention with a dense MLP in every layer"
        )
    matrices = [parameter for parameter in parameters if parameter.dim() == 2]
    attention = sum(parameter.numel() for parameter in matrices if id(parameter) in inside)
    mlp = sum(parameter.numel() for parameter in matrices if id(parameter) not in inside)
    return attention, mlp, sum(parameter.numel() for parameter in parameters if parameter.dim() < 2)


def _intermediate_size(layer: Any, hidden: int) -> int:
    """The MLP's inner width, read off its weights (a fused gate doubles one side, so the smallest counts)."""
    inside = {id(parameter) for module in _attention_modules(layer) for parameter in module.parameters()}
    sides = {side for p in layer.parameters() if p.dim() == 2 and id(p) not in inside for side in p.shape}
    return min(sides - {hidden}, default=hidden)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _key_value_size(config: Any, attention_weights: float, name: str) -> int:
    """Width of the keys, read off the attention's weights and held against the config where it says so."""
    num_heads, head_dim = config.num_attention_heads, _head_dim(config)
    num_heads_found = attention_weights / (2 * config.hidden_size * head_dim) - num_heads
    expected = getattr(config, "num_key_value_heads", None) or round(num_heads_found)
    if not 1 <= expected <= num_heads or abs(num_heads_found - expected) > 1e-6:
        raise ValueError(
            f"{name} ({config.model_type}) does not have plain query, key, value and output projections in every "
            "layer, which is what the published formulas describe"
        )
    return expected * head_dim


def _embedding_parameters(model: Any) -> dict[int, int]:
    """Entries of every embedding table and of the output layer, by the identity of the tensor, so ties count once."""
    from torch.nn import Embedding

    tables = [module.weight for module in model.modules() if isinstance(module, Embedding)]
    tables.append(model.get_output_embeddings().weight)
    return {id(table): table.numel() for table in tables}
