"""A tiny random model of every architecture that transformers knows as a causal LM, and of ten with other heads.

Sizes are set by the names that configs share, in nested configs too. Where that isn't enough, `OVERRIDES` says what
else has to shrink. It serves to build tiny models here; the package itself has no table of architectures.
"""

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import ModelOutput


CAUSAL_LM, SEQ_CLS = "CAUSAL_LM", "SEQ_CLS"
# Every model type of transformers' causal-LM mapping, and the name of its class.
MODEL_TYPES: dict[str, str] = dict(sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()))
_AUTO_CLASSES = {
    CAUSAL_LM: transformers.AutoModelForCausalLM,
    SEQ_CLS: transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
# Dense ones, experts, linear attention, windows, learned positions.
_WITH_OTHER_HEADS = (
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "smollm3",
)
# The same for other tasks, by model type and task.
OTHER_TASKS: dict[str, str] = {
    f"{model_type}:{task}": auto_class._model_mapping[CONFIG_MAPPING[model_type]].__name__
    for model_type in _WITH_OTHER_HEADS
    for task, auto_class in _AUTO_CLASSES.items()
    if task != CAUSAL_LM
}
CLASS_NAMES = MODEL_TYPES | OTHER_TASKS
VOCABULARY = 97
WINDOW = 6
NUM_ATTENTION_HEADS = 4

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": NUM_ATTENTION_HEADS,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "is_decoder": True,
    "tie_word_embeddings": False,
    # encoder-decoder types, whose decoder alone is the causal LM
    "ffn_dim": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": NUM_ATTENTION_HEADS,
    "decoder_attention_heads": NUM_ATTENTION_HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    # windows
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "local_attention": 2 * WINDOW,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "first_k_dense_replace": 1,
    # latent attention
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 12,
    "v_head_dim": 6,
    # attention that picks keys
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 4,
    # recurrent layers
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 2,
    "linear_head_dim": 8,
}
# Fields that name the kind of every layer; two layers of each kind are built.
_LAYER_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")

_WIDE_FULL_LAYERS = {"per_layer_config": {1: {"head_dim": 12}, 3: {"head_dim": 12}}}
_GEMMA4_TEXT = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 4, "num_kv_shared_layers": 2}
_GEMMA4_TEXT |= _WIDE_FULL_LAYERS
_INKLING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "rel_extent": 8, "d_rel": 4}
_DOTS3_NOTE = {
    "per_layer_config": {
        layer: {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 12,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        }
        for layer in (1, 3)
    }
}
_QWEN4_EXP = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "hc_lowrank": 4}
_QWEN4_EXP |= {"indexer_compress_ratio": 2}

_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4}
_CONV_AND_FULL = {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4}

_DRAFTER = "It drafts for a larger model, whose keys and values it reads (`shared_kv_states`), and doesn't run alone."
NOT_ALONE = {"gemma4_assistant": _DRAFTER, "gemma4_unified_assistant": _DRAFTER}

# The causal LM of these types is built from the part of their configuration named `decoder`.
DECODER_CONFIGS = ("musicgen", "musicgen_melody")

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "num_hidden_layers": 4},
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cpmant": {"dim_ff": 48, "dim_head": 8},
    "ctrl": {"dff": 48},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_top_k": 2},
    },
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 8, "hc_mult": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4},
    "dots3_note": {
        "text_config": _DOTS3_NOTE,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS3_NOTE,
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 4,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
    },
    "gemma4": {"text_config": _GEMMA4_TEXT},
    "gemma4_text": _GEMMA4_TEXT,
    "gemma4_unified": {"text_config": _WIDE_FULL_LAYERS},
    "gemma4_unified_text": _WIDE_FULL_LAYERS,
    "got_ocr2": {
        "vision_config": {"output_channels": 8, "image_size": 64, "mlp_dim": 48, "global_attn_indexes": (1,)}
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": _LINEAR_AND_FULL,
    "inkling2_text": _INKLING,
    "inkling_text": _INKLING,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": _CONV_AND_FULL,
    "lfm2_moe": {**_CONV_AND_FULL, "num_dense_layers": 1},
    "longcat_flash": {
        "zero_expert_num": 2,
        "num_layers": 2,
        "head_dim": 4,
        "expert_ffn_hidden_size": 16,
        "ffn_hidden_size": 48,
    },
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 2,
        "index_topk_blocks": 2,
    },
    "ministral": {"layer_types": ["sliding_attention", "full_attention"]},
    "phi4_multimodal": {
        "audio_config": {"nemo_conv_channels": 8, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32}
    },
    "qwen4_exp": {"text_config": _QWEN4_EXP},
    "qwen4_exp_text": _QWEN4_EXP,
    "recurrent_gemma": {"num_hidden_layers": 6},
    "reformer": {"axial_pos_embds": False, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4},
    "roc_bert": {"shape_vocab_size": 20, "pronunciation_vocab_size": 20},
    "smollm3": {"no_rope_layer_interval": 2},
    "xlm": {"causal": True},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def _accepted(config_class: type[PreTrainedConfig]) -> set[str]:
    return set(config_class.__dataclass_fields__) | set(config_class.attribute_map)


def _declared(config_class: type[PreTrainedConfig], name: str) -> Any:
    field = config_class.__dataclass_fields__.get(config_class.attribute_map.get(name, name))
    return None if field is None else field.default


def _is_noise(config_class: type[PreTrainedConfig], name: str) -> bool:
    """Whether a field is a dropout rate or the like, which would make two forwards in training differ."""
    return ("drop" in name or "jitter" in name) and isinstance(_declared(config_class, name), float)


def _num_key_value_heads(config_class: type[PreTrainedConfig]) -> int:
    if _declared(config_class, "num_key_value_heads") == 1:
        return 1
    # Latent attention has as many key heads as query heads.
    return NUM_ATTENTION_HEADS if "kv_lora_rank" in _accepted(config_class) else NUM_ATTENTION_HEADS // 2


def _generic_sizes(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    accepted = _accepted(config_class)
    default = config_class()
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ["any"]))
    num_layers = 2 * len(kinds)
    sizes = {**_SIZES, "num_hidden_layers": num_layers, "num_key_value_heads": _num_key_value_heads(config_class)}
    sizes = {config_class.attribute_map.get(name, name): size for name, size in sizes.items() if name in accepted}
    sizes |= dict.fromkeys((name for name in sorted(accepted) if _is_noise(config_class, name)), 0.0)
    for name in _LAYER_KINDS:
        found = getattr(default, name, None) if name in config_class.__dataclass_fields__ else None
        if found:
            sizes[name] = (list(dict.fromkeys(found)) * num_layers)[:num_layers]
    for name in config_class.sub_configs:
        value = getattr(default, name, None)
        if isinstance(value, PreTrainedConfig):
            sizes[name] = {"model_type": value.model_type, **_generic_sizes(type(value))}
    return sizes


def _merge(sizes: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(sizes)
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = _merge(merged[name], value)
        else:
            merged[name] = value
    return merged


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A configuration of that type with tiny sizes and without dropout."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_merge(_generic_sizes(config_class), OVERRIDES.get(model_type, {})))


def task_of(subject: str) -> str:
    """What the model of a model type is for, `CAUSAL_LM` unless it is named as in `OTHER_TASKS`."""
    return subject.partition(":")[2] or CAUSAL_LM


def answer_of(output: ModelOutput) -> torch.Tensor:
    """What a model says: logits, those of first and last token `[B, T, 2]`, or the states where there is no head."""
    if "start_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]], dim=-1)
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def tiny_model(subject: str, attn_implementation: str | None = None, seed: int = 0) -> PreTrainedModel:
    """A model in evaluation mode, whose weights are large enough for its attention to be far from uniform.

    Args:
        subject: one of `MODEL_TYPES` for a causal LM, or of `OTHER_TASKS`.
        attn_implementation: None for what transformers picks.
        seed: of the weights; the same seed gives the same model.

    Raises:
        ValueError: the type is among `NOT_ALONE`, or doesn't know that attention implementation.
    """
    model_type = subject.partition(":")[0]
    if model_type in NOT_ALONE:
        raise ValueError(NOT_ALONE[model_type])
    torch.manual_seed(seed)
    config = tiny_config(model_type)
    if model_type in DECODER_CONFIGS:
        model_class = getattr(transformers, MODEL_TYPES[model_type])
        return model_class._from_config(config.decoder, attn_implementation=attn_implementation).eval()
    if task_of(subject) != CAUSAL_LM:
        config.num_labels = 3
    return _AUTO_CLASSES[task_of(subject)].from_config(config, attn_implementation=attn_implementation).eval()
