"""PEFT's own LoRA and all kinds of ParScale adapters, made in one way, so that one test asks the same of both."""

import re
from functools import lru_cache

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from parscale_adapt import ParScaleConfig
from support.outputs import GREEDY, logits
from support.tiny_models import random_tokens, tiny_model


LOW_RANK = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
METHODS = {
    "LoRA": {},
    "prefix": {"num_streams": 2, "num_prefix_tokens": 3},
    "static": {"num_streams": 4, "num_prefix_tokens": 3, "aggregator": "static"},
    "stream LoRA": {"num_streams": 2, "stream_transform": "lora", "aggregator": "mean"},
    "BitFit": {"num_streams": 3, "stream_transform": "bitfit"},
    "together": {
        "num_streams": 3,
        "num_prefix_tokens": 3,
        "stream_transform": ["prefix", "lora"],
        "stream_lora_alpha": 4.0,
    },
    "prefix and LoRA": {"num_streams": 2, "num_prefix_tokens": 3, "lora": LOW_RANK},
    "one stream with LoRA": {"num_streams": 1, "lora": LOW_RANK},
}
PARSCALE = tuple(method for method in METHODS if method != "LoRA")
SEVERAL = tuple(method for method in METHODS if METHODS[method].get("num_streams", 1) > 1)
# Every method on one architecture, and every architecture with one of the methods.
CASES = [("qwen2", method) for method in METHODS] + [
    ("llama", "static"),
    ("gpt2", "prefix and LoRA"),
    ("opt", "prefix"),
    ("mistral", "stream LoRA"),
    ("gemma3_text", "prefix"),
    ("qwen3_moe", "BitFit"),
    ("deepseek_v3", "prefix"),
]


def config(method: str, **fields) -> PeftConfig:
    """A configuration of one of `METHODS`; the backbone alone is `"one stream"`."""
    if method == "LoRA":
        return LoraConfig(task_type="CAUSAL_LM", **LOW_RANK, **fields)
    given = {"num_streams": 1} if method == "one stream" else METHODS[method]
    return ParScaleConfig(task_type="CAUSAL_LM", **{**given, **fields})


@torch.no_grad()
def stir(model: torch.nn.Module, adapter_name: str = "default", seed: int = 1) -> None:
    """Move all tensors of an adapter, as training would, by amounts that depend on nothing but the seed."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    for name in sorted(tensors_of(model, adapter_name)):
        parameters[name].add_(torch.randn(parameters[name].shape, generator=generator) * 0.3)


def adapted(
    method: str, model_type: str = "qwen2", adapter_name: str = "default", seed: int = 1, dtype=None, **fields
) -> PeftModel:
    """A tiny model with one adapter that clearly changes its output, in evaluation mode."""
    backbone = tiny_model(model_type).to(dtype or torch.float32)
    torch.manual_seed(seed)
    model = get_peft_model(backbone, config(method, **fields), adapter_name)
    stir(model, adapter_name, seed)
    return model.eval()


def add(model: PeftModel, method: str, adapter_name: str, seed: int = 2, **fields) -> None:
    """One more adapter, which gives the output of `adapted(method, seed=seed, **fields)`."""
    torch.manual_seed(seed)
    model.add_adapter(adapter_name, config(method, **fields))
    stir(model, adapter_name, seed)
    model.eval()


@lru_cache
def plain(model_type: str = "qwen2") -> torch.Tensor:
    """Logits of the plain backbone."""
    return logits(tiny_model(model_type))


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def tensors_of(model: torch.nn.Module, adapter_name: str) -> set[str]:
    """Names of the parameters of one adapter."""
    own = re.compile(rf"\.(parscale_\w+|lora_[AB]|modules_to_save)\.{re.escape(adapter_name)}(\.|$)")
    return {name for name, _ in model.named_parameters() if own.search(name)}


def tuner_layers(model: torch.nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def scores(model: torch.nn.Module, **options) -> torch.Tensor:
    """Logits of every generated token `[B, 6, vocabulary]`."""
    given = {"input_ids": random_tokens(), **GREEDY, **options}
    result = model.generate(**given, return_dict_in_generate=True, output_logits=True)
    return torch.stack(result.logits, 1)
