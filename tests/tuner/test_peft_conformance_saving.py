"""What PEFT's generic tests ask of every method about files and states, asked of LoRA and of ParScale alike.

Written anew after the list in PEFT's `tests/testing_common.py`; what concerns running stands in
`test_peft_conformance_running.py`. Of the list, these don't apply to files of streams:

| PEFT's test | why not |
|---|---|
| pickled files (`safe_serialization=False`) | this project writes and reads safetensors only |
| hotswapping | PEFT itself refuses all methods but LoRA; held here |
| conversion to LoRA | streams are no change of weights; PEFT refuses it, held here |
| a model holds the configuration that it is given | it holds a copy, and the user's stays as it was |
| `ignore_mismatched_sizes`, partial states | a file that does not fit is refused (`test_state.py`) |
"""

import json
import warnings

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    convert_to_lora,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from support.outputs import logits
from support.peft_methods import CASES, METHODS, PARSCALE, adapted, add, config, plain, stir, tensors_of, trainable
from support.tiny_models import VOCABULARY, tiny_model
from transformers import AutoModelForCausalLM


pytestmark = pytest.mark.slow


FILE = "adapter_model.safetensors"


def not_loaded(result, model, adapter_name):
    """Tensors of an adapter that PEFT reports as missing, and all that it reports as unexpected."""
    return [*(tensors_of(model, adapter_name) & set(result.missing_keys)), *result.unexpected_keys]


@pytest.mark.parametrize("method", METHODS)
def test_a_save_writes_the_adapter_its_configuration_and_a_card_and_no_backbone(tmp_path, method):
    model = adapted(method)
    model.get_base_model().name_or_path = model.get_base_model().config._name_or_path = "some/backbone"
    model.peft_config["default"].base_model_name_or_path = "some/backbone"
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {FILE, "adapter_config.json", "README.md"}
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "some/backbone"
    assert fields["peft_type"] == ("LORA" if method == "LoRA" else "PARSCALE")
    assert fields["inference_mode"]
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card
    assert "base_model: some/backbone" in card
    assert not model.peft_config["default"].inference_mode


@pytest.mark.parametrize(("model_type", "method"), CASES)
def test_two_models_loaded_from_one_folder_agree_with_the_saved_one(tmp_path, model_type, method):
    model = adapted(method, model_type)
    model.save_pretrained(tmp_path)
    expected, state = logits(model), model.state_dict()
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")
            loaded = PeftModel.from_pretrained(tiny_model(model_type), tmp_path)
        assert loaded.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
        assert torch.equal(logits(loaded), expected)
        assert not loaded.training
        assert trainable(loaded) == set()
    assert not torch.allclose(expected, plain(model_type), atol=1e-3)


@pytest.mark.parametrize(
    ("model_type", "method"), [*(("qwen2", method) for method in METHODS), ("gpt2", "prefix"), ("opt", "BitFit")]
)
def test_low_cpu_memory_leaves_no_tensor_without_data_and_gives_the_same_output(tmp_path, model_type, method):
    model = adapted(method, model_type)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(model_type), tmp_path, low_cpu_mem_usage=True)
    result = loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    assert not_loaded(result, loaded, "other") == []
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cpu"}
    for name in ("default", "other"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_injected_without_data_is_filled_from_a_state(method):
    model = adapted(method)
    injected = inject_adapter_in_model(config(method), tiny_model(), low_cpu_mem_usage=True).eval()
    assert {parameter.device.type for parameter in injected.parameters()} == {"cpu", "meta"}
    empty = get_peft_model(tiny_model(), config(method), low_cpu_mem_usage=True).eval()
    assert {name for name, parameter in empty.named_parameters() if parameter.is_meta} == tensors_of(empty, "default")
    result = set_peft_model_state_dict(empty, get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert not_loaded(result, empty, "default") == []
    assert torch.equal(logits(empty), logits(model))


@pytest.mark.parametrize("method", METHODS)
def test_only_selected_adapters_are_saved_each_in_its_own_folder(tmp_path, method):
    model = adapted(method)
    for seed, name in enumerate(("first", "second"), 2):
        add(model, method, name, seed=seed)
    model.save_pretrained(tmp_path, selected_adapters=["default", "second"])
    assert {path.parent.name for path in tmp_path.rglob(FILE)} == {tmp_path.name, "second"}
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "under another name")
    assert list(loaded.peft_config) == ["default", "under another name"]
    for name, found in (("default", "default"), ("second", "under another name")):
        model.set_adapter(name)
        loaded.set_adapter(found)
        assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match=r"invalid `selected_adapters` .* got \['third'\]"):
        model.save_pretrained(tmp_path, selected_adapters=["third"])


@pytest.mark.parametrize("method", METHODS)
def test_names_that_contain_each_other_are_told_apart(tmp_path, method):
    model = adapted(method)
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / FILE)
    for seed, name in enumerate(("default2", "other_default", "foodefault_bar", "efaul"), 2):
        add(model, method, name, seed=seed)
    model.save_pretrained(tmp_path, selected_adapters=["default", "efaul"])
    saved, other = load_file(tmp_path / FILE), load_file(tmp_path / "efaul" / FILE)
    assert saved.keys() == other.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.items())
    model.set_adapter("efaul")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "efaul")), logits(model))


@pytest.mark.parametrize("name", ["weight", "lora_A", "0", "a (b+", "parscale_prefix_k"])
@pytest.mark.parametrize("method", ["LoRA", "prefix and LoRA"])
def test_any_name_without_a_dot_is_saved_and_loaded(tmp_path, method, name):
    model = adapted(method, adapter_name=name)
    model.save_pretrained(tmp_path)
    for given in ("default", name):
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / name, adapter_name=given)
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("method", METHODS)
def test_the_configuration_is_read_or_taken_as_given(tmp_path, method):
    model = adapted(method)
    model.save_pretrained(tmp_path)
    read, given = PeftConfig.from_pretrained(tmp_path), config(method)
    assert type(read) is type(given)
    assert all(getattr(read, name) == value for name, value in METHODS[method].items() if name != "lora")
    if "LoRA" in method and method != "stream LoRA":
        assert (read if method == "LoRA" else read.lora).r == 4
    assert read.inference_mode
    assert trainable(get_peft_model(tiny_model(), read)) == set()
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, config=given)
    assert (loaded.peft_config["default"] is given) == (method == "LoRA")
    assert given.inference_mode
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("method", METHODS)
def test_several_adapters_are_loaded_from_one_folder(tmp_path, method):
    model = adapted(method)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    for name in ("other", "yet-another"):
        assert not_loaded(loaded.load_adapter(tmp_path, name), loaded, name) == []
        assert loaded.active_adapters == ["default"]
    for name in ("yet-another", "other", "default"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_loaded_is_frozen_unless_asked_otherwise(tmp_path, method):
    adapted(method).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model().train(), tmp_path)
    assert not loaded.training
    loaded.load_adapter(tmp_path, "second", is_trainable=True)
    assert (loaded.peft_config["default"].inference_mode, loaded.peft_config["second"].inference_mode) == (True, False)
    loaded.set_adapter("second")
    assert trainable(loaded) == tensors_of(loaded, "second") != set()
    loaded = PeftModel.from_pretrained(tiny_model().train(), tmp_path, is_trainable=True)
    assert loaded.training
    assert trainable(loaded) == tensors_of(loaded, "default")


@pytest.mark.parametrize("method", METHODS)
def test_states_go_from_one_model_to_another(method):
    model, other = adapted(method), adapted(method, seed=3)
    assert not torch.equal(logits(model), logits(other))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(other))
    other = adapted(method, seed=3)
    add(other, method, "second", seed=4)
    before = logits(other)
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model), adapter_name="second")
    assert not_loaded(result, other, "second") == []
    assert torch.equal(logits(other), before)
    other.set_adapter("second")
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize(("model_type", "method"), [*(("qwen2", method) for method in METHODS), ("gpt2", "prefix")])
def test_the_state_of_the_backbone_is_read_and_written_under_its_own_names(model_type, method):
    expected = tiny_model(model_type).state_dict()
    model = adapted(method, model_type)
    with_adapter = logits(model)
    for changed in (False, True):
        if changed:
            with torch.no_grad():
                for name, parameter in model.get_base_model().named_parameters():
                    if f"base_model.model.{name}" not in tensors_of(model, "default"):
                        parameter.mul_(0.9)
            assert not torch.equal(logits(model), with_adapter)
            result = set_base_model_state_dict(model, expected)
            assert (result.missing_keys, result.unexpected_keys) == ([], [])
        found = get_base_model_state_dict(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(logits(model), with_adapter)


@pytest.mark.parametrize("method", METHODS)
def test_folders_are_found_by_the_auto_class_by_subfolder_and_with_a_device_map(tmp_path, method):
    tiny_model().save_pretrained(tmp_path / "backbone")
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    model = get_peft_model(backbone, config(method)).eval()
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    options = [
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        PeftModel.from_pretrained(tiny_model(), tmp_path, subfolder="adapter"),
        PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter", device_map={"": "cpu"}),
    ]
    for loaded in options:
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("method", METHODS)
def test_adapters_that_come_later_follow_the_wish_for_their_dtype(tmp_path, method):
    dtype = torch.bfloat16
    for autocast, expected in ((True, torch.float32), (False, dtype)):
        model = get_peft_model(tiny_model().to(dtype), config(method), autocast_adapter_dtype=autocast)
        model.add_adapter("added", config(method), autocast_adapter_dtype=autocast)
        model.save_pretrained(tmp_path)
        model.load_adapter(tmp_path, "loaded", autocast_adapter_dtype=autocast)
        parameters = dict(model.named_parameters())
        for name in ("default", "added", "loaded"):
            assert {parameters[key].dtype for key in tensors_of(model, name)} == {expected}, name
            model.set_adapter(name)
            assert logits(model).dtype == dtype


@pytest.mark.parametrize("method", METHODS)
def test_a_save_while_disabled_is_complete_and_other_ranks_write_nothing(tmp_path, method):
    model = adapted(method)
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "other rank", is_main_process=False)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")), logits(model))
    assert list((tmp_path / "other rank").iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
def test_trained_copies_of_modules_follow_their_adapter(tmp_path, method):
    fields = {"modules_to_save": ["lm_head"]}
    if "lora" in METHODS[method]:
        fields["lora"] = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
    model = adapted(method, **fields)
    expected = logits(model)
    add(model, method, "second", **fields)
    assert torch.equal(logits(model), expected)
    assert trainable(model) == tensors_of(model, "default")
    model.set_adapter("second")
    assert trainable(model) == tensors_of(model, "second")
    assert torch.equal(logits(model), logits(adapted(method, seed=2, **fields)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "second")
    assert torch.equal(logits(loaded), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), plain())
    model.delete_adapter("second")
    assert torch.equal(logits(model), expected)
    assert tensors_of(model, "second") == set()


@pytest.mark.parametrize("method", ["LoRA", "prefix", "one stream with LoRA"])
@pytest.mark.parametrize("resized", [False, True])
def test_embeddings_that_peft_saves_too_are_loaded(tmp_path, method, resized):
    tiny_model().save_pretrained(tmp_path / "backbone")
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    if resized:
        backbone.resize_token_embeddings(VOCABULARY + 4)
    fields = {} if method == "LoRA" else {"verify_backbone": False}
    model = get_peft_model(backbone, config(method)).eval()
    stir(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers="auto" if resized else True)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    other.resize_token_embeddings(VOCABULARY + 4 * resized)
    assert torch.equal(logits(PeftModel.from_pretrained(other, tmp_path / "adapter", **fields)), logits(model))


COPIES = {
    "LoRA": {"modules_to_save": ["embed_tokens"]},
    "prefix": {"modules_to_save": ["embed_tokens"]},
    "prefix and LoRA": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("method", COPIES)
def test_two_adapters_with_trained_copies_of_modules_are_saved(tmp_path, method):
    model = adapted(method, **COPIES[method])
    add(model, method, "second", **COPIES[method])
    model.save_pretrained(tmp_path)
    for name in ("default", "second"):
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path if name == "default" else tmp_path / name)
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("method", PARSCALE)
def test_what_peft_offers_for_lora_only_is_refused_and_changes_nothing(tmp_path, method):
    model = adapted(method)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but PARSCALE was passed"):
        hotswap_adapter(model, tmp_path, "default")
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=4)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("method", ["LoRA", "prefix"])
def test_files_of_another_method_and_empty_folders_are_refused(tmp_path, method):
    adapted("prefix" if method == "LoRA" else "LoRA").save_pretrained(tmp_path / "other")
    model = adapted(method)
    expected = logits(model)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.load_adapter(tmp_path / "other", "other")
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        model.load_adapter(tmp_path, "nothing")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)
