"""Adapters by transformers' own `add_adapter`, `load_adapter` and others, asked of LoRA and of ParScale alike."""

from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.outputs import logits
from support.peft_methods import METHODS, adapted, config, plain, stir, trainable
from support.tiny_models import random_tokens, tiny_model
from transformers import AutoModelForCausalLM


def own(method, adapter_name="default", seed=1):
    """A transformers model that holds the adapter of `adapted(method, seed=seed)` without a `PeftModel` around it."""
    model = tiny_model()
    torch.manual_seed(seed)
    model.add_adapter(config(method), adapter_name)
    stir(model, adapter_name, seed)
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_a_transformers_model_runs_generates_and_is_switched_off_and_on(method):
    model, reference = own(method), adapted(method)
    assert torch.equal(logits(model), logits(reference))
    assert {f"base_model.model.{name}" for name in trainable(model)} == trainable(reference)
    options = {"input_ids": random_tokens(), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**options), reference.generate(**options))
    model.disable_adapters()
    assert torch.equal(logits(model), plain())
    model.enable_adapters()
    assert torch.equal(logits(model), logits(reference))
    assert model.active_adapters() == ["default"]
    model.delete_adapter("default")
    assert torch.equal(logits(model), plain())


@pytest.mark.parametrize("method", METHODS)
def test_a_transformers_model_saves_what_a_peft_model_saves(tmp_path, method):
    model, reference = own(method), adapted(method)
    model.save_pretrained(tmp_path / "own")
    reference.save_pretrained(tmp_path / "peft")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "own")), logits(reference))
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert {path.name for path in (tmp_path / "own").iterdir()} >= set(names)
    assert not (tmp_path / "own" / "model.safetensors").exists()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("by_auto_class", [False, True])
def test_a_saved_adapter_is_loaded_or_refused_by_transformers(tmp_path, method, by_auto_class):
    tiny_model().save_pretrained(tmp_path / "backbone")
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    reference = get_peft_model(backbone, config(method)).eval()
    stir(reference)
    reference.save_pretrained(tmp_path / "adapter")
    model = tiny_model()
    with pytest.raises(ValueError, match=r"PeftModel\.from_pretrained") if method != "LoRA" else nullcontext():
        if by_auto_class:
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
        else:
            model.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(model), logits(reference) if method == "LoRA" else plain())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("by_transformers", [False, True])
def test_a_backbone_that_has_an_adapter_is_given_another_or_refused(method, by_transformers):
    backbone = own(method)
    torch.manual_seed(2)
    with pytest.raises(ValueError, match="already") if method != "LoRA" else nullcontext():
        if by_transformers:
            backbone.add_adapter(config(method), "second")
        else:
            get_peft_model(backbone, config(method), "second").eval()
    if method == "LoRA":
        stir(backbone, "second", 2)
        assert torch.equal(logits(backbone), logits(adapted(method, seed=2)))
        backbone.set_adapter("default")
    assert torch.equal(logits(backbone), logits(adapted(method)))
    backbone.delete_adapter("default")
    if method == "LoRA":
        backbone.delete_adapter("second")
    assert torch.equal(logits(backbone), plain())
