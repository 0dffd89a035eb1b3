"""PEFT calls our methods back by names, most of them private: a renamed one would silently never be called."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from support.outputs import logits
from support.peft_methods import adapted, config
from support.tiny_models import tiny_model

from parscale_adapt.tuner.config import ParScaleConfig
from parscale_adapt.tuner.model import ParScaleModel
from parscale_adapt.tuner.registration import CALLBACKS, register_method


STATE_DICT_HOOKS = {
    "_get_adapter_state_dict": "save",
    "_remove_adapter_name_from_key": "save",
    "_remap_adapter_state_dict_for_load": "load",
}


@pytest.fixture
def called(monkeypatch):
    """Names of the callbacks that ran, in their order; the callbacks do what they did."""
    names = []

    def spy_on(name):
        original = ParScaleModel.__dict__.get(name) or next(
            vars(parent)[name] for parent in ParScaleModel.__mro__ if name in vars(parent)
        )
        function = getattr(original, "__func__", original)

        def spy(*args, **kwargs):
            names.append(name)
            return function(*args, **kwargs)

        kind = type(original) if isinstance(original, (classmethod, staticmethod)) else lambda function: function
        monkeypatch.setattr(ParScaleModel, name, kind(spy))

    for name in CALLBACKS:
        spy_on(name)
    return names


def test_all_callbacks_are_known_and_nothing_else():
    own = {name for parent in ParScaleModel.__mro__ if "parscale_adapt" in parent.__module__ for name in vars(parent)}
    inherited = {name for name in own if not name.startswith("__") and callable(getattr(BaseTuner, name, None))}
    assert inherited == set(CALLBACKS)
    assert len(CALLBACKS) == len(inherited)


@pytest.mark.parametrize("method", ["prefix", "prefix and LoRA", "BitFit", "one stream with LoRA"])
def test_saving_and_loading_run_our_state_dict_hooks(tmp_path, called, method):
    model = adapted(method)
    called.clear()
    model.save_pretrained(tmp_path)
    assert {name for name, when in STATE_DICT_HOOKS.items() if when == "save"} <= set(called)
    called.clear()
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert "_remap_adapter_state_dict_for_load" in called
    called.clear()
    loaded.load_adapter(tmp_path, "second")
    assert "_remap_adapter_state_dict_for_load" in called
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_own_save_runs_our_state_dict_hooks(tmp_path, called):
    model = tiny_model()
    model.add_adapter(config("prefix"))
    model.save_pretrained(tmp_path)
    assert {"_get_adapter_state_dict", "_remove_adapter_name_from_key"} <= set(called)


def test_attaching_calls_back_in_the_order_that_is_written_down(called):
    get_peft_model(tiny_model(), config("prefix and LoRA"))
    in_order = [
        name for name in dict.fromkeys(called) if name not in ("_check_target_module_exists", "_replace_module")
    ]
    assert in_order == [
        "inject_adapter",
        "_check_new_adapter_config",
        "_prepare_adapter_config",
        "_prepare_model",
        "_create_and_replace",
        "set_adapter",
        "_mark_only_adapters_as_trainable",
        "_cast_adapter_dtype",
    ]


def test_everything_that_we_override_is_called_in_the_life_of_an_adapter(tmp_path, called):
    model = adapted("prefix and LoRA")
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "second")
    with model.disable_adapter():
        logits(model)
    model.set_adapter("second")
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="can't be merged in place"):
        model.merge_adapter()
    model.merge_and_unload()
    PeftModel.from_pretrained(tiny_model(), tmp_path).unload()
    assert set(called) == set(CALLBACKS)


@pytest.mark.parametrize("name", STATE_DICT_HOOKS)
def test_a_peft_without_our_callbacks_is_refused_when_the_method_is_registered(monkeypatch, name):
    monkeypatch.delattr(BaseTuner, name)
    with pytest.raises(RuntimeError, match=rf"PEFT \d\S+ no longer calls {name}, by which .* install the version"):
        register_method(ParScaleConfig, ParScaleModel)
