"""The door of a decoder: one wrapped `forward` by which streams enter and leave."""

import copy
import inspect
import pickle
import threading
from unittest import mock

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import get_peft_model
from support.outputs import logits
from support.tiny_models import random_tokens, tiny_config, tiny_model, with_streams
from support.traces import traces
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from parscale_adapt import ParScaleConfig


OPTIONS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def decoder_of(model):
    return model.get_base_model().model


@torch.no_grad()
def test_a_forward_that_is_called_past_module_hooks_runs_the_streams():
    model = with_streams(tiny_model(), 3)
    decoder = decoder_of(model)
    expected = decoder(input_ids=random_tokens()).last_hidden_state
    result = decoder.forward(input_ids=random_tokens()).last_hidden_state
    assert result.shape == (2, 9, 32)
    assert torch.equal(result, expected)


def test_the_door_keeps_the_signature_of_the_forward_that_it_wraps():
    plain, streamed = tiny_model().model, decoder_of(with_streams(tiny_model()))
    assert inspect.signature(streamed.forward) == inspect.signature(plain.forward)


@torch.no_grad()
def test_a_copy_has_a_door_of_its_own():
    model = with_streams(tiny_model())
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert decoder_of(twin).forward.decoder is decoder_of(twin)
        assert torch.equal(logits(twin), expected)
        for name, parameter in twin.named_parameters():
            if "prefix_k" in name:
                parameter.zero_()
        assert not torch.allclose(logits(twin), expected)
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_streams_compile_to_one_graph(use_cache):
    model = with_streams(tiny_model(), 3).get_base_model()
    inputs = {"input_ids": random_tokens(), "use_cache": use_cache}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_code_follows_a_switch_and_a_mixed_batch():
    model = with_streams(tiny_model(), 3)
    model.add_adapter("two", ParScaleConfig(num_streams=2, num_prefix_tokens=3, init_std=0.5))
    compiled = torch.compile(model.get_base_model(), backend="eager")

    def by_compiled():
        return compiled(input_ids=random_tokens(), use_cache=False).logits

    for name in ("default", "two", "default"):
        model.set_adapter(name)
        torch.testing.assert_close(by_compiled(), logits(model), atol=1e-5, rtol=1e-5)
    names = ["two", "__base__"]
    expected = model(input_ids=random_tokens(), use_cache=False, adapter_names=names).logits
    with model.base_model._enable_peft_forward_hooks(adapter_names=names):
        torch.testing.assert_close(by_compiled(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_compiled(), logits(model), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_threads_that_mix_adapters_do_not_mix_each_others():
    model = with_streams(tiny_model(), 2, lora={"r": 2, "init_lora_weights": False})
    model.add_adapter("four", ParScaleConfig(num_streams=4, num_prefix_tokens=3, init_std=0.5))
    batches = (["default", "four"], ["__base__", "default"], ["four", "four"], None)

    def generate(names):
        return model.generate(input_ids=random_tokens(), **OPTIONS, **({"adapter_names": names} if names else {}))

    expected = [generate(names) for names in batches]
    failures, start = [], threading.Barrier(len(batches))

    def work(names, tokens):
        start.wait()
        try:
            failures.extend(names for _ in range(5) if not torch.equal(generate(names), tokens))
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(batches, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


class Broken(RuntimeError):
    pass


@torch.no_grad()
def test_an_exception_in_a_hybrid_leaves_the_cache_as_the_caller_knows_it():
    config = tiny_config(
        "qwen3_next",
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        head_dim=8,
    )
    model = with_streams(AutoModelForCausalLM.from_config(config).eval(), 3)
    cache = model(input_ids=random_tokens()).past_key_values
    shapes = [{key: state.shape for key, state in cache.layers[0].recurrent_states.items()}]
    last = decoder_of(model).layers[-1]
    with mock.patch.object(last, "forward", side_effect=Broken), pytest.raises(Broken):
        model(input_ids=random_tokens()[:, :1], past_key_values=cache)
    assert [{key: state.shape for key, state in cache.layers[0].recurrent_states.items()}] == shapes
    assert all(shape[0] == 2 for shape in shapes[0].values())
    assert model(input_ids=random_tokens()[:, :1], past_key_values=cache).logits.isfinite().all()


@torch.no_grad()
def test_an_exception_in_a_mixed_batch_is_over_with_it():
    model = with_streams(tiny_model(), 2)
    expected = logits(model)
    last = decoder_of(model).layers[-1]
    with mock.patch.object(last, "forward", side_effect=Broken), pytest.raises(Broken):
        model(input_ids=random_tokens(), adapter_names=["default", "__base__"])
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("attached_first", [False, True])
@torch.no_grad()
def test_hooks_of_accelerate_and_the_door_go_together(attached_first):
    backbone = tiny_model()
    before, plain = traces(backbone), backbone(input_ids=random_tokens()).logits
    expected = logits(with_streams(tiny_model()))
    if not attached_first:
        add_hook_to_module(backbone.model, ModelHook())
    model = with_streams(backbone)
    if attached_first:
        add_hook_to_module(backbone.model, ModelHook())
    assert torch.equal(logits(model), expected)
    unloaded = model.unload()
    assert torch.equal(unloaded(input_ids=random_tokens()).logits, plain)
    remove_hook_from_module(unloaded.model)
    assert torch.equal(unloaded(input_ids=random_tokens()).logits, plain)
    vars(unloaded.model).pop("forward", None)  # accelerate leaves the bound forward behind
    assert traces(unloaded) == before


@torch.no_grad()
def test_a_cache_belongs_to_an_adapter_and_not_to_its_name():
    model = with_streams(tiny_model(), 2)
    cache = model(input_ids=random_tokens()).past_key_values
    model.add_adapter("other", ParScaleConfig(num_streams=2, num_prefix_tokens=3))
    model.delete_adapter("default")
    model.add_adapter("default", ParScaleConfig(num_streams=2, num_prefix_tokens=3, init_std=0.5))
    model.set_adapter("default")
    with pytest.raises(ValueError, match="was filled by the adapter 'default' and can't be continued by"):
        model(input_ids=random_tokens(), past_key_values=cache)


@torch.no_grad()
def test_a_cache_and_a_copy_of_its_model_go_on_together():
    model = with_streams(tiny_model(), 2)
    cache = model(input_ids=random_tokens()).past_key_values
    expected = model(input_ids=random_tokens(), past_key_values=copy.deepcopy(cache)).logits
    assert torch.equal(copy.deepcopy(model)(input_ids=random_tokens(), past_key_values=cache).logits, expected)


def test_a_copy_of_a_configuration_holds_no_weights_and_is_a_plain_one():
    model = with_streams(tiny_model())
    decoder = decoder_of(model)
    for module in (decoder, decoder.layers[0].self_attn):
        twin = copy.deepcopy(module.config)
        assert type(twin) is type(model.get_base_model().config)
        assert twin.to_dict() == model.get_base_model().config.to_dict()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_what_changes_in_a_copy_of_a_configuration_changes_nothing_in_the_model(copied):
    model = with_streams(tiny_model())
    before = model.get_base_model().config.to_dict()
    twin = copied(decoder_of(model).config)
    twin.__dict__.pop("hidden_size")
    twin.num_hidden_layers = 17
    assert model.get_base_model().config.to_dict() == before


def test_fields_that_differ_by_layer_outlive_attaching():
    changes = {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "global_head_dim": 12}
    config = tiny_config("gemma4_text", head_dim=8, num_hidden_layers=3, num_kv_shared_layers=0, **changes)
    config.layer_types = ["sliding_attention", "sliding_attention", "full_attention"]
    backbone = AutoModelForCausalLM.from_config(config).eval()
    assert backbone.config.is_heterogeneous
    before = backbone.config.to_dict(), [layer.to_dict() for layer in backbone.config.per_layer_config]
    model = get_peft_model(backbone, ParScaleConfig(num_streams=2, num_prefix_tokens=3))
    model(input_ids=random_tokens())
    config = backbone.config
    assert (config.to_dict(), [layer.to_dict() for layer in config.per_layer_config]) == before


def test_a_mask_function_that_is_registered_later_is_used(monkeypatch):
    model = with_streams(tiny_model())
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    seen = []
    stock = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def spy(*args, **kwargs):
        seen.append(kwargs["batch_size"])
        return stock(*args, **kwargs)

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, "sdpa", spy)
    model(input_ids=random_tokens(), attention_mask=mask)
    assert seen == [2]
