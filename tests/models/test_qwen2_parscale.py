"""What users do to published checkpoints as to any model of transformers: quantize them, put LoRA on them."""

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.quantized import load_in_4bit
from support.tiny_models import random_tokens, tiny_config

from parscale_adapt import Qwen2ParScaleConfig, Qwen2ParScaleForCausalLM


@pytest.fixture
def published():
    fields = tiny_config("qwen2", hidden_size=64, initializer_range=0.2).to_dict()
    for name in ("model_type", "architectures"):
        fields.pop(name)
    return Qwen2ParScaleForCausalLM(Qwen2ParScaleConfig(**fields, parscale_n=2, parscale_n_tokens=3)).eval()


@torch.no_grad()
def test_in_4_bit_it_computes_with_the_weights_as_they_are_rounded(published, tmp_path):
    published.save_pretrained(tmp_path)
    quantized = load_in_4bit(tmp_path)
    for name, module in quantized.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            rounded = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            published.get_submodule(name).weight.copy_(rounded)
    expected = published(input_ids=random_tokens()).logits
    torch.testing.assert_close(quantized(input_ids=random_tokens()).logits, expected, atol=1e-3, rtol=1e-3)


def test_lora_on_all_linear_layers_leaves_the_layer_over_all_streams_alone(published):
    expected = published(input_ids=random_tokens()).logits
    model = get_peft_model(published, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    torch.testing.assert_close(model(input_ids=random_tokens()).logits, expected)
    assert not hasattr(published.model.aggregate_layer[0], "lora_A")
    model(input_ids=random_tokens(), labels=random_tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_model_without_a_checkpoint_starts_with_all_its_weights_drawn(published):
    first = published.model.aggregate_layer[0]
    assert first.weight.std().item() == pytest.approx(0.2, rel=0.1)
    assert not first.bias.any()
