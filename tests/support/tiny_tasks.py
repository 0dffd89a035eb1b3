"""Tiny models with other heads than that of a causal LM, or none, and what they say."""

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from parscale_adapt import ParScaleConfig
from support.tiny_models import random_tokens, tiny_config


HEADLESS = "FEATURE_EXTRACTION"
AUTO_CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    HEADLESS: AutoModel,
}
TASKS = tuple(AUTO_CLASSES)
WITH_HEAD = tuple(task for task in TASKS if task != HEADLESS)


def tiny_for(task: str, model_type: str = "qwen2", seed: int = 0, **changes) -> PreTrainedModel:
    """A model in evaluation mode, with three labels where it has labels."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, initializer_range=0.2, **changes)
    config.num_labels = 3
    return AUTO_CLASSES[task].from_config(config, attn_implementation="sdpa").eval()


def in_streams(task: str, num_streams: int = 3, model: PreTrainedModel | None = None, **fields) -> PeftModel:
    """A model with an adapter and a head that clearly change what it says."""
    torch.manual_seed(1)
    fields = {"num_prefix_tokens": 3, "init_std": 0.5, **fields}
    config = ParScaleConfig(task_type=task, num_streams=num_streams, **fields)
    adapted = get_peft_model(tiny_for(task) if model is None else model, config).eval()
    change_head(adapted)
    return adapted


@torch.no_grad()
def change_head(model: PeftModel, adapter_name: str = "default", seed: int = 3) -> None:
    """Move the head's copy, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"modules_to_save.{adapter_name}." in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def said(model: torch.nn.Module, **inputs) -> torch.Tensor:
    """Logits, or states where there is no head: `[B, labels]`, `[B, T, 2]` for answers, else `[B, T, size]`."""
    output = model(**({"input_ids": random_tokens()} | inputs))
    return answer(output)


def answer(output) -> torch.Tensor:
    if "start_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]], -1)
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def labels_for(task: str) -> dict[str, torch.Tensor]:
    """Labels for the usual tokens `[2, 9]`."""
    if task == "QUESTION_ANS":
        return {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 8])}
    return {"labels": torch.tensor([0, 2]) if task == "SEQ_CLS" else random_tokens() % 3}
