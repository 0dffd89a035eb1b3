"""Which model a recipe trains: the same one each time that it is asked for, with the streams of the adapter."""

import pytest
import torch
from peft import TaskType
from safetensors.torch import load_file
from support.tiny_models import random_tokens, tiny_model, with_streams

from parscale_adapt.training import BackboneArguments, model_in_streams, reference_model
from parscale_adapt.tuner.config import ParScaleArguments


@pytest.fixture
def backbone(tmp_path):
    tiny_model().save_pretrained(tmp_path / "backbone")  # whose LM head is not tied
    return str(tmp_path / "backbone")


def save_adapter(folder, **fields):
    model = with_streams(tiny_model(), **fields)
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("init_weights", ["normal", "tokens"])
@pytest.mark.parametrize("train_backbone", [False, True])
def test_a_model_is_built_twice_alike(backbone, init_weights, train_backbone):
    streams = ParScaleArguments(
        num_streams=2, num_prefix_tokens=3, init_weights=init_weights, train_backbone=train_backbone
    )
    options = (backbone, BackboneArguments(backbone), streams, 0)
    model = model_in_streams(*options).eval()
    reference = reference_model(model, *options)
    assert (reference is None) == (not train_backbone)
    other = reference if train_backbone else model_in_streams(*options).eval()
    assert torch.equal(model(random_tokens()).logits, other(random_tokens()).logits)
    if train_backbone:
        assert not any(parameter.requires_grad for parameter in reference.parameters())
        assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("train_backbone", [False, True])
def test_a_causal_lm_s_adapter_gets_a_new_head_and_keeps_all_else(tmp_path, backbone, train_backbone):
    tensors = save_adapter(tmp_path / "adapter", train_backbone=train_backbone)
    arguments = BackboneArguments(backbone, adapter_name_or_path=str(tmp_path / "adapter"))
    streams = ParScaleArguments(train_backbone=train_backbone)
    model = model_in_streams(backbone, arguments, streams, 0, TaskType.SEQ_CLS)
    model.eval().save_pretrained(tmp_path / "judge")
    judged = load_file(tmp_path / "judge" / "adapter_model.safetensors")
    head = {"base_model.model.lm_head.weight"} & tensors.keys()
    assert bool(head) == train_backbone
    assert judged.keys() - tensors.keys() == {"base_model.model.score.weight"}
    assert tensors.keys() - judged.keys() == head
    assert all(torch.equal(judged[name], tensors[name]) for name in judged.keys() & tensors.keys())
    assert judged["base_model.model.score.weight"].shape == (1, 32)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("score.modules_to_save" in name for name in trained)
    assert any("embed_tokens" in name for name in trained) == train_backbone
