"""The authors' published layout: its tensor names and its configuration, to and from an adapter on a Qwen2.

Their code runs on transformers 4, so a configuration for it is written in the words of that version.
"""

import json
import re
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from ..models.qwen2_parscale import Qwen2ParScaleConfig, Qwen2ParScaleForCausalLM
from ..tuner.config import ParScaleConfig
from .folders import PUBLISHED_TYPE


_OUR_KEYS = ("parscale_n", "parscale_n_tokens", "parscale_attn_smooth")
_NAMES = (  # published, in an adapter file
    (r"\.self_attn\.prefix_([kv])$", r".self_attn.parscale_prefix_\1"),
    (r"^model\.aggregate_layer\.", "model.parscale_aggregator."),
)
_KEPT_KEYS = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "max_window_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
)


def name_in_adapter(published_name: str) -> str:
    """The name relative to the backbone; backbone tensors keep theirs."""
    for pattern, replacement in _NAMES:
        published_name = re.sub(pattern, replacement, published_name)
    return published_name


def published_shapes(config: Qwen2ParScaleConfig) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of all tensors of a checkpoint; a tied LM head is none."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def backbone_config(config: Qwen2ParScaleConfig) -> Qwen2Config:
    """The configuration of the plain Qwen2 inside a published checkpoint."""
    fields = config.to_dict()
    for key in (*_OUR_KEYS, "model_type", "architectures", "auto_map"):
        fields.pop(key, None)
    return Qwen2Config(**fields, architectures=["Qwen2ForCausalLM"])


def refuse_unpublishable(config: ParScaleConfig, model_type: str) -> None:
    """Check that the published layout has a place for such streams on such a backbone.

    Raises:
        ValueError: it has none.
    """
    if model_type != Qwen2Config.model_type:
        raise ValueError(
            f"The backbone must be a Qwen2 in the published layout, got one of the type {model_type!r}: export with "
            "`--format standalone`."
        )
    for name, value in {"stream_transform": "prefix", "aggregator": "dynamic"}.items():
        if config.num_streams > 1 and getattr(config, name) != value:
            raise ValueError(
                f"`{name}` must be {value!r} in the published layout, got {getattr(config, name)!r}: export with "
                "`--format standalone`."
            )


def published_model(model: PreTrainedModel, streams: ParScaleConfig) -> Qwen2ParScaleForCausalLM:
    """A merged model in the published classes, on the same tensors, in one dtype.

    Args:
        model: what `merge_and_unload` gives for a Qwen2.
        streams: the configuration of the adapter that was merged.
    """
    fields = model.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "parscale"):
        fields.pop(key, None)
    values = (streams.num_streams, streams.num_prefix_tokens, streams.aggregator_smoothing)
    config = Qwen2ParScaleConfig(**fields, **dict(zip(_OUR_KEYS, values)))
    with torch.device("meta"):
        published = Qwen2ParScaleForCausalLM._from_config(config)
    dtype = model.get_input_embeddings().weight.dtype
    state = {published_name(name): tensor.to(dtype) for name, tensor in model.state_dict().items()}
    published.load_state_dict(state, assign=True)
    published.tie_weights()
    published.generation_config = model.generation_config
    return published


def published_name(name: str) -> str:
    """Published name of a tensor in a standalone model."""
    name = re.sub(r"\.parscale\.(prefix_[kv])\.weight$", r".\1", name)
    return name.replace("model.parscale.aggregator.", "model.aggregate_layer.")


def write_published_config(config: Qwen2ParScaleConfig, dtype: torch.dtype, folder: Path) -> None:
    """Write `config.json` in the words of transformers 4.

    Raises:
        ValueError: they don't suffice for this backbone.
    """
    fields = config.to_dict()
    rotary = dict(fields["rope_parameters"])
    theta = rotary.pop("rope_theta")
    written = {
        "architectures": ["Qwen2ParScaleForCausalLM"],
        "model_type": PUBLISHED_TYPE,
        **{key: fields[key] for key in (*_KEPT_KEYS, *_OUR_KEYS)},
        "rope_theta": theta,
        "rope_scaling": None if rotary["rope_type"] == "default" else rotary,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": transformers.__version__,
    }
    (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    again = Qwen2ParScaleConfig.from_pretrained(folder)
    for name in ("layer_types", "rope_parameters"):
        if getattr(again, name) != getattr(config, name):
            raise ValueError(
                f"The published layout can't say that `{name}` is {getattr(config, name)}: export with "
                "`--format standalone`."
            )
