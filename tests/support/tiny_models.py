"""Tiny random causal LMs of many architectures, and adapters whose tensors are large enough to matter."""

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from parscale_adapt import ParScaleConfig


VOCABULARY = 97

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXTRAS = {
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "llama": {},
    "mistral": {"sliding_window": 5, "head_dim": 8},
    "gemma3_text": {"sliding_window": 5, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {},
    "phi3": {},
    "olmo2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_oss": {
        "sliding_window": 5,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "deepseek_v3": {  # caches latents, from which it computes keys of 12 and values of 6
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 6,
        "first_k_dense_replace": 2,
    },
}
ARCHITECTURES = tuple(_EXTRAS)


def tiny_config(model_type: str, **changes):
    return AutoConfig.for_model(model_type, **{**_SIZES, **_EXTRAS.get(model_type, {}), **changes})


def tiny_model(model_type: str = "qwen2", implementation: str = "sdpa", seed: int = 0, **changes) -> PreTrainedModel:
    """A causal LM in evaluation mode with weights large enough for its attention to be far from uniform."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, initializer_range=0.2, **changes)
    if model_type == "opt":
        config.init_std = 0.2
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def with_streams(
    model: PreTrainedModel, num_streams: int = 2, adapter_name: str = "default", seed: int = 1, **fields
) -> PeftModel:
    """The model with an adapter that clearly changes its output."""
    torch.manual_seed(seed)
    fields = {"task_type": "CAUSAL_LM", "num_prefix_tokens": 3, "init_std": 0.5, **fields}
    return get_peft_model(model, ParScaleConfig(num_streams=num_streams, **fields), adapter_name).eval()


def streams_of(
    model_type: str = "qwen2",
    num_streams: int = 3,
    implementation: str | None = None,
    init_std: float = 0.5,
    **changes,
) -> PeftModel:
    """A tiny model, whose configuration has `changes`, with an adapter; under sdpa where it knows sdpa."""
    implementation = implementation or ("eager" if model_type == "gpt_oss" else "sdpa")
    return with_streams(tiny_model(model_type, implementation, **changes), num_streams, init_std=init_std)


def with_second_adapter(model: PeftModel, num_streams: int = 4) -> PeftModel:
    """The model with one more adapter, `"second"`, which is not active yet."""
    fields = {"num_streams": num_streams, "num_prefix_tokens": 5, "init_std": 0.5}
    model.add_adapter("second", ParScaleConfig(task_type="CAUSAL_LM", **fields))
    return model.eval()


def random_tokens(batch_size: int = 2, length: int = 9, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch_size, length), generator=generator)
