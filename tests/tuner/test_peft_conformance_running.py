"""What PEFT's generic tests ask of every method that runs and is switched, asked of LoRA and of ParScale alike.

Written anew after the list in PEFT's `tests/testing_common.py`; files and states stand in
`test_peft_conformance_saving.py`, training in `test_peft_conformance_training.py`. Expected is the plain backbone, or
an adapter alone on it. Of the list, these don't apply to streams:

| PEFT's test | why not |
|---|---|
| weighted combination of adapters | a sum of two sets of streams is not the sum of what they do |
| `bias`, `layers_to_transform`, `target_modules` | streams run through the whole backbone; no such fields |
| trainable tokens, prompt learning tasks | other methods; `modules_to_save` trains embeddings |
| `merge_adapter` of several streams | no single set of weights does what several streams do |
| several adapters active at once | one set of streams runs at a time (`test_tuner.py`) |
| `PeftMixedModel` | PEFT itself allows it for a list of its own methods only |
"""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.outputs import GREEDY, close, logits
from support.peft_methods import (
    CASES,
    METHODS,
    PARSCALE,
    adapted,
    add,
    config,
    plain,
    scores,
    tensors_of,
    trainable,
    tuner_layers,
)
from support.tiny_models import VOCABULARY, random_tokens, tiny_model


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", METHODS)
def test_a_peft_model_has_what_its_users_call(method):
    model = adapted(method, adapter_name="test-adapter")
    assert isinstance(model, PeftModel)
    assert model.peft_config["test-adapter"] is model.active_peft_config
    assert (model.active_adapter, model.active_adapters) == ("test-adapter", ["test-adapter"])
    assert all(callable(getattr(model, name)) for name in ("save_pretrained", "from_pretrained", "push_to_hub"))
    assert model.get_base_model() is model.base_model.model
    assert model.get_base_model().config is model.config
    assert model.get_input_embeddings().weight.shape == (VOCABULARY, 32)
    assert model.base_model.targeted_module_names
    assert tensors_of(model, "test-adapter") == trainable(model) != set()
    assert torch.equal(model(random_tokens(), return_dict=False)[0], logits(model))


@pytest.mark.parametrize(("model_type", "method"), CASES)
def test_disabled_it_is_the_backbone_and_enabled_again_it_is_the_adapter(model_type, method):
    model = adapted(method, model_type)
    expected, expected_scores = logits(model), scores(model)
    assert not torch.allclose(expected, plain(model_type), atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain(model_type))
        close(scores(model), scores(tiny_model(model_type)), 1e-5)
        assert not model.get_model_status().enabled
    assert torch.equal(logits(model), expected)
    close(scores(model), expected_scores, 1e-5)
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        assert torch.equal(logits(model), plain(model_type))
    assert torch.equal(logits(model), plain(model_type))
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), expected)
    assert trainable(model) == tensors_of(model, "default")


@pytest.mark.parametrize("method", METHODS)
def test_what_happens_while_disabled_counts_afterwards(method):
    model = adapted(method)
    with model.disable_adapter():
        add(model, method, "other")
        assert torch.equal(logits(model), plain())
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), logits(adapted(method)))
    model.base_model.disable_adapter_layers()
    model.delete_adapter("default")
    assert torch.equal(logits(model), plain())
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), logits(adapted(method, seed=2)))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_trainable_follows_the_active_adapter(method):
    model = adapted(method)
    add(model, method, "other")
    assert trainable(model) == tensors_of(model, "default")
    model.set_adapter("other")
    assert trainable(model) == tensors_of(model, "other")
    model.set_adapter("default", inference_mode=True)
    assert trainable(model) == set()
    model.set_requires_grad(["default", "other"])
    assert trainable(model) == tensors_of(model, "default") | tensors_of(model, "other")
    model.set_requires_grad("default", requires_grad=False)
    assert trainable(model) == tensors_of(model, "other")
    with pytest.raises(ValueError, match="Adapter third not found"):
        model.set_adapter("third")
    with pytest.raises(ValueError, match="Adapter with name 'other' already exists"):
        model.add_adapter("other", config(method))
    frozen = get_peft_model(tiny_model(), config(method, inference_mode=True))
    assert trainable(frozen) == set()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_keeps_the_mode_of_what_was_there(method, training):
    model = adapted(method).train(training)
    modules = list(model.modules())
    model.add_adapter("other", config(method))
    assert {module.training for module in modules} == {training}


@pytest.mark.parametrize(("model_type", "method"), CASES)
def test_deleting_the_active_adapter_activates_another_and_deleting_all_leaves_the_backbone(model_type, method):
    model = adapted(method, model_type)
    expected = logits(model)
    for seed, name in enumerate(("active", "idle"), 2):
        add(model, method, name, seed=seed)
    model.set_adapter("active")
    with pytest.warns(UserWarning, match="Adapter active was active which is now deleted. Setting active"):
        model.delete_adapter("active")
    assert model.active_adapters == ["default"]
    model.delete_adapter("idle")
    assert list(model.peft_config) == model.active_adapters == ["default"]
    for layer in tuner_layers(model):
        containers = [getattr(layer, name) for name in (*layer.adapter_layer_names, *layer.other_param_names)]
        assert all(not {"active", "idle"} & set(container) for container in containers)
    assert tensors_of(model, "active") | tensors_of(model, "idle") == set()
    assert torch.equal(logits(model), expected)
    assert trainable(model) == tensors_of(model, "default")
    with pytest.raises(ValueError, match="Adapter unknown does not exist"):
        model.delete_adapter("unknown")
    model.delete_adapter("default")
    assert model.active_adapters == list(model.peft_config) == []
    assert torch.equal(logits(model.base_model), plain(model_type))


@pytest.mark.parametrize("method", METHODS)
def test_no_layer_remembers_a_deleted_adapter(method):
    model = adapted(method)
    add(model, method, "deleted")
    model.delete_adapter("deleted")
    tables = [value for layer in tuner_layers(model) for value in vars(layer).values() if isinstance(value, dict)]
    assert tables
    assert not any("deleted" in table for table in tables)


@pytest.mark.parametrize("method", METHODS)
def test_after_the_last_adapter_was_deleted_a_new_one_can_be_added_or_all_be_unloaded(method):
    model = adapted(method)
    model.delete_adapter("default")
    add(model, method, "new")
    model.set_adapter("new")
    assert torch.equal(logits(model), logits(adapted(method, seed=2)))
    model.delete_adapter("new")
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), plain())
    assert list(unloaded.state_dict()) == list(tiny_model().state_dict())


@pytest.mark.parametrize(("model_type", "method"), CASES)
def test_unloading_gives_the_plain_backbone_and_merging_the_adapter_without_peft(model_type, method):
    for unload in (True, False):
        model = adapted(method, model_type)
        with_adapter = logits(model)
        bare = model.unload() if unload else model.merge_and_unload()
        assert tuner_layers(bare) == []
        assert not hasattr(bare, "peft_config")
        close(logits(bare), plain(model_type) if unload else with_adapter)
        if unload:
            assert torch.equal(logits(bare), plain(model_type))
            assert list(bare.state_dict()) == list(tiny_model(model_type).state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_the_named_adapter_is_merged_in_a_copy_without_touching_the_original(method):
    model = adapted(method)
    add(model, method, "other")
    expected = logits(model)
    for name, seed in (("other", 2), ("default", 1)):
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=[name])
        close(logits(merged), logits(adapted(method, seed=seed)))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("method", PARSCALE)
def test_merging_in_place_is_refused_and_changes_nothing(method):
    model = adapted(method)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"merge_and_unload"):
        model.merge_adapter()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.get_model_status().merged_adapters == []


@pytest.mark.parametrize("method", PARSCALE)
def test_merging_an_unknown_adapter_is_refused(method):
    with pytest.raises(ValueError, match="unknown"):
        adapted(method).merge_and_unload(adapter_names=["unknown"])


@pytest.mark.parametrize("method", ["LoRA", "prefix and LoRA", "one stream with LoRA"])
def test_a_safe_merge_refuses_low_rank_weights_that_are_no_numbers(method):
    model = adapted(method)
    with torch.no_grad():
        for name in tensors_of(model, "default"):
            if ".lora_" in name:
                model.get_parameter(name).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize("names", [["default"], ["default"] * 3])
@pytest.mark.parametrize("method", METHODS)
def test_as_many_names_as_samples_are_asked_for(method, names):
    model = adapted(method)
    with pytest.raises(ValueError, match="`adapter_names`"):
        model(input_ids=random_tokens(2), adapter_names=names)
    with pytest.raises(ValueError, match="`adapter_names`"):
        model.generate(input_ids=random_tokens(2), adapter_names=names, **GREEDY)


@pytest.mark.parametrize("method", METHODS)
def test_names_are_taken_in_evaluation_for_loaded_adapters_and_not_while_disabled(method):
    model = adapted(method)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=random_tokens(), adapter_names=["default"] * 2).logits, plain())
    with pytest.raises(ValueError, match="unknown"):
        model(input_ids=random_tokens(), adapter_names=["default", "unknown"])
    with pytest.raises(ValueError, match=r"`adapter_names`.* in training mode"):
        model.train()(input_ids=random_tokens(), adapter_names=["default"] * 2)


@pytest.mark.parametrize("name", ["", "a.b", "keys"])
@pytest.mark.parametrize("method", METHODS)
def test_a_name_that_no_module_can_have_is_refused_and_leaves_the_backbone_as_it_was(method, name):
    model = adapted(method)
    with pytest.raises((KeyError, ValueError)):
        model.add_adapter(name, config(method))
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert torch.equal(logits(model), logits(adapted(method)))
    backbone = tiny_model()
    with pytest.raises((KeyError, ValueError)):
        get_peft_model(backbone, config(method), name)
    assert tuner_layers(backbone) == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())
    assert torch.equal(logits(backbone), plain())


def test_a_name_that_files_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="base_layer"):
        adapted("prefix", adapter_name="base_layer")


@pytest.mark.parametrize("method", ["LoRA", "prefix and LoRA", "one stream with LoRA"])
def test_an_adapter_that_could_not_be_added_leaves_nothing_behind(method):
    model = adapted(method)
    names, expected = list(model.state_dict()), logits(model)
    fields = {"r": 4, "target_modules": ["nothing"]}
    other = LoraConfig(task_type="CAUSAL_LM", **fields) if method == "LoRA" else config(method, lora=fields)
    with pytest.raises(ValueError, match="not found in the base model"):
        model.add_adapter("other", other)
    assert list(model.peft_config) == list(model.base_model.peft_config) == ["default"]
    assert list(model.state_dict()) == names
    assert trainable(model) == tensors_of(model, "default")
    assert torch.equal(logits(model), expected)


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "method"), CASES)
def test_samples_of_one_batch_run_different_adapters(model_type, method):
    model = adapted(method, model_type, "first")
    add(model, method, "second")
    names = ["__base__", "first", "second", "first"]
    tokens = random_tokens(4)
    beams = {"input_ids": tokens, **GREEDY, "num_beams": 3}
    mixed = model(input_ids=tokens, adapter_names=names).logits
    mixed_beams = model.generate(**beams, adapter_names=names)
    for name in ("__base__", "first", "second"):
        rows = [index for index, other in enumerate(names) if other == name]
        if name == "__base__":
            with model.disable_adapter():
                expected, expected_beams = model(input_ids=tokens).logits, model.generate(**beams)
        else:
            model.set_adapter(name)
            expected, expected_beams = model(input_ids=tokens).logits, model.generate(**beams)
        close(mixed[rows], expected[rows])
        assert torch.equal(mixed_beams[rows], expected_beams[rows])


@pytest.mark.parametrize(("model_type", "method"), CASES)
def test_generation_takes_positions_embeddings_and_masks(model_type, method):
    model = adapted(method, model_type)
    tokens = random_tokens()
    expected = model.generate(input_ids=tokens, **GREEDY)
    assert torch.equal(model.generate(tokens, **GREEDY), expected)
    assert torch.equal(model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **GREEDY), expected)
    uncached = tokens
    for _ in range(GREEDY["max_new_tokens"]):
        with torch.no_grad():
            following = model(input_ids=uncached, use_cache=False).logits[:, -1:].argmax(-1)
        uncached = torch.cat([uncached, following], 1)
    assert torch.equal(expected, uncached)
    embedded = model.get_input_embeddings()(tokens)
    with torch.no_grad():
        close(model(inputs_embeds=embedded).logits, logits(model))
    assert torch.equal(model.generate(inputs_embeds=embedded, **GREEDY), expected[:, tokens.shape[1] :])


@pytest.mark.parametrize("method", METHODS)
def test_the_status_tells_what_is_there(method):
    model = adapted(method)
    add(model, method, "other")
    model.set_adapter("other")
    status, layers = model.get_model_status(), model.get_layer_status()
    assert status.peft_types == dict.fromkeys(("default", "other"), "LORA" if method == "LoRA" else "PARSCALE")
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["other"], [])
    assert status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": False, "other": True}
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert status.num_adapter_layers == len(layers) == len(tuner_layers(model))
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert status.total_params == sum(p.numel() for p in model.parameters())
    tuner_layers(model)[0].enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"


@torch.no_grad()
@pytest.mark.parametrize(
    "method",
    METHODS,
)
def test_the_last_hidden_state_is_what_the_lm_head_sees(method):
    model = adapted(method)
    result = model(input_ids=random_tokens(), output_hidden_states=True)
    close(model.get_output_embeddings()(result.hidden_states[-1]), result.logits)


def test_one_stream_without_any_tensor_is_disabled_and_reported_as_other_adapters():
    model = get_peft_model(tiny_model(), config("one stream")).eval()
    with model.disable_adapter():
        assert torch.equal(logits(model), plain())
    assert model.get_model_status().enabled
    assert model.get_model_status().active_adapters == ["default"]


@pytest.mark.parametrize("method", PARSCALE)
@pytest.mark.parametrize("names", [["default", "other"], ["other", "other"]])
def test_one_adapter_runs_at_a_time(method, names):
    model = adapted(method)
    add(model, method, "other")
    with pytest.raises(ValueError, match="Only one ParScale adapter can be active at a time"):
        model.base_model.set_adapter(names)
    assert torch.equal(logits(model), logits(adapted(method)))
