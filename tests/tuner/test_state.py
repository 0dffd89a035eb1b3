import json
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support.outputs import logits
from support.tiny_models import tiny_model, with_streams
from transformers import AutoModelForCausalLM

from parscale_adapt import ParScaleConfig
from parscale_adapt.tuner.state import checkpoint_key


ATTENTION = [f"base_model.model.model.layers.{layer}.self_attn" for layer in range(2)]
AGGREGATOR = "base_model.model.model.parscale_aggregator"
ADAPTER_SHAPES = {
    **{f"{name}.parscale_prefix_{kind}": (2, 2, 3, 8) for name in ATTENTION for kind in "kv"},
    f"{AGGREGATOR}.0.weight": (32, 64),
    f"{AGGREGATOR}.0.bias": (32,),
    f"{AGGREGATOR}.2.weight": (2, 32),
    f"{AGGREGATOR}.2.bias": (2,),
}


def file_of(folder):
    return folder / "adapter_model.safetensors"


def shapes_in(folder):
    return {name: tuple(tensor.shape) for name, tensor in load_file(file_of(folder)).items()}


@torch.no_grad()
def changed(model):
    """As after training: every trainable tensor has moved."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def load(folder, **options):
    return PeftModel.from_pretrained(tiny_model(**options.pop("backbone", {})), folder, **options)


@pytest.mark.parametrize("adapter_name", ["default", "kv", "0"])
def test_a_file_holds_exactly_the_tensors_of_one_adapter(tmp_path, adapter_name):
    model = with_streams(tiny_model(), adapter_name=adapter_name)
    model.add_adapter("other", ParScaleConfig(task_type="CAUSAL_LM", num_streams=4))
    model.save_pretrained(tmp_path, selected_adapters=[adapter_name])
    folder = tmp_path if adapter_name == "default" else tmp_path / adapter_name
    assert shapes_in(folder) == ADAPTER_SHAPES


@pytest.mark.parametrize("tied", [False, True])
def test_a_file_with_a_trained_backbone_holds_every_parameter_once(tmp_path, tied):
    backbone = tiny_model(tie_word_embeddings=tied)
    expected = {f"base_model.model.{name}": tuple(tensor.shape) for name, tensor in backbone.named_parameters()}
    with_streams(backbone, train_backbone=True).save_pretrained(tmp_path)
    assert ("base_model.model.lm_head.weight" in expected) == (not tied)
    assert shapes_in(tmp_path) == {**expected, **ADAPTER_SHAPES}


@pytest.mark.parametrize("num_streams", [2, 4])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    ("fields", "backbone"),
    [
        ({}, {}),
        ({}, {"model_type": "gpt2"}),
        ({"train_backbone": True}, {}),
        ({"train_backbone": True}, {"tie_word_embeddings": True}),
        ({"train_backbone": True}, {"model_type": "gpt2"}),
        ({"init_weights": "reparameterized"}, {}),
        ({"init_weights": "tokens"}, {}),
        ({"modules_to_save": ["lm_head"]}, {}),
        ({"modules_to_save": ["norm"]}, {}),
    ],
)
def test_a_saved_adapter_gives_the_same_logits_again(tmp_path, fields, backbone, num_streams, low_cpu_mem_usage):
    model = changed(with_streams(tiny_model(**backbone), num_streams, **fields))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert model.get_base_model().training == model.training  # saving changes no mode
    reloaded = load(tmp_path, backbone=backbone, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(logits(reloaded), expected, atol=1e-5, rtol=1e-5)
    assert not any(parameter.requires_grad for name, parameter in reloaded.named_parameters() if "parscale" in name)
    if backbone.get("tie_word_embeddings") or backbone.get("model_type") == "gpt2":
        assert reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight


def test_a_folded_prefix_goes_on_as_a_plain_one(tmp_path):
    model = with_streams(tiny_model(), init_weights="reparameterized")
    model.save_pretrained(tmp_path)
    assert shapes_in(tmp_path) == ADAPTER_SHAPES
    reloaded = load(tmp_path, is_trainable=True)
    assert {name for name, parameter in reloaded.named_parameters() if parameter.requires_grad} == {
        name for name, _ in reloaded.named_parameters() if "parscale" in name
    }
    reloaded.save_pretrained(tmp_path / "again")
    again, first = load_file(file_of(tmp_path / "again")), load_file(file_of(tmp_path))
    assert all(torch.equal(again[name], first[name]) for name in ADAPTER_SHAPES)


def test_a_folded_prefix_is_not_loaded_into_a_prefix_that_is_still_computed(tmp_path):
    model = with_streams(tiny_model(), init_weights="reparameterized")
    model.save_pretrained(tmp_path)
    before = logits(model)
    with pytest.raises(
        ValueError, match=r"Adapter 'default' computes its prefixes by an MLP .* load the file into a new"
    ):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), before)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), before)


def test_an_adapter_in_training_is_filled_from_a_file(tmp_path):
    saved, model = changed(with_streams(tiny_model())), with_streams(tiny_model(), seed=7)
    saved.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(model), logits(saved))
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "parscale" in name)


def test_a_backbone_trained_with_one_stream_is_saved_and_restored(tmp_path):
    model = changed(with_streams(tiny_model(), num_streams=1, train_backbone=True))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))
    assert not torch.equal(logits(model), logits(tiny_model()))


def test_a_trained_backbone_is_loaded_trainable_again(tmp_path):
    with_streams(tiny_model(), train_backbone=True).save_pretrained(tmp_path)
    assert all(parameter.requires_grad for parameter in load(tmp_path, is_trainable=True).parameters())


def test_one_frozen_stream_saves_nothing_and_loads_as_the_backbone(tmp_path):
    with_streams(tiny_model(), num_streams=1).save_pretrained(tmp_path)
    assert shapes_in(tmp_path) == {}
    assert torch.equal(logits(load(tmp_path)), logits(tiny_model()))


@pytest.mark.parametrize("adapter_name", ["default", "prefix", "model"])
def test_a_file_is_loaded_under_any_name(tmp_path, adapter_name):
    model = with_streams(tiny_model())
    model.save_pretrained(tmp_path)
    reloaded = load(tmp_path, adapter_name=adapter_name)
    assert torch.equal(logits(reloaded), logits(model))
    reloaded.load_adapter(tmp_path, "second")
    reloaded.set_adapter("second")
    assert torch.equal(logits(reloaded), logits(model))


@pytest.mark.parametrize("train_backbone", [False, True])
def test_the_auto_class_finds_the_backbone(tmp_path, train_backbone):
    tiny_model().save_pretrained(tmp_path / "backbone")
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone").eval()
    model = changed(with_streams(backbone, train_backbone=train_backbone))
    model.save_pretrained(tmp_path / "adapter")
    reloaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert reloaded.peft_config["default"].num_streams == 2
    assert torch.equal(logits(reloaded), logits(model))


def test_a_half_precision_backbone_gives_the_same_logits_again(tmp_path):
    model = changed(with_streams(tiny_model().bfloat16()))
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(file_of(tmp_path)).values()} == {torch.float32}
    reloaded = PeftModel.from_pretrained(tiny_model().bfloat16(), tmp_path)
    assert torch.equal(logits(reloaded), logits(model))


def test_a_trained_backbone_keeps_the_dtype_that_it_is_loaded_in(tmp_path):
    changed(with_streams(tiny_model(), train_backbone=True)).save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny_model().bfloat16(), tmp_path, low_cpu_mem_usage=True)
    assert {p.dtype for name, p in reloaded.named_parameters() if "parscale" not in name} == {torch.bfloat16}


def edit(folder, change):
    tensors = load_file(file_of(folder))
    change(tensors)
    save_file(tensors, file_of(folder), metadata={"format": "pt"})


PREFIX = f"{ATTENTION[0]}.parscale_prefix_k"
EDITS = {
    "missing prefix": (
        lambda tensors: tensors.pop(PREFIX),
        r"missing: base_model\.model\.model\.layers\.0\.self_attn",
    ),
    "missing aggregator": (lambda tensors: tensors.pop(f"{AGGREGATOR}.2.bias"), r"missing: .*aggregator\S+2\.bias"),
    "unexpected": (
        lambda tensors: tensors.update({"lora_A.weight": torch.zeros(1)}),
        r"unexpected: lora_A\.weight",
    ),
    "wrong shape": (
        lambda tensors: tensors.update({PREFIX: torch.zeros(4, 2, 3, 8)}),
        r"of wrong shape: \S+layers\.0\S+prefix_k\S+ \(4, 2, 3, 8\) instead of \(2, 2, 3, 8\)",
    ),
    "empty": (
        lambda tensors: tensors.update({PREFIX: torch.zeros(0)}),
        r"of wrong shape: \S+ \(0,\) instead of \(2, 2, 3, 8\)",
    ),
    "nothing": (lambda tensors: tensors.clear(), r"missing: .* and 5 more"),
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("case", EDITS)
def test_a_file_that_does_not_hold_what_its_config_asks_for_is_refused(tmp_path, case, low_cpu_mem_usage):
    change, message = EDITS[case]
    with_streams(tiny_model()).save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=f"The adapter file does not hold the tensors .*{message}"):
        load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_a_file_without_a_part_of_its_trained_backbone_is_refused(tmp_path):
    with_streams(tiny_model(), train_backbone=True).save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop("base_model.model.model.norm.weight"))
    with pytest.raises(ValueError, match=r"missing: base_model\.model\.model\.norm\.weight\."):
        load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("num_streams", 4, "of wrong shape"), ("num_prefix_tokens", 5, r"instead of \(2, 2, 5, 8\)")],
)
def test_a_config_that_does_not_fit_its_file_is_refused(tmp_path, field, value, message):
    with_streams(tiny_model()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("train_backbone", [False, True])
def test_shards_that_were_not_gathered_are_not_saved(tmp_path, train_backbone):
    model = with_streams(tiny_model(), train_backbone=train_backbone)
    shard = "base_model.model.model.layers.1.self_attn.parscale.parscale_prefix_v.default.weight"
    state_dict = model.state_dict() | {shard: torch.empty(0)}
    with pytest.raises(ValueError, match=rf"state of adapter 'default' .* of wrong shape: {shard} \(0,\) instead"):
        model.save_pretrained(tmp_path, state_dict=state_dict)
    assert not file_of(tmp_path).exists()
    if train_backbone:
        del state_dict["base_model.model.model.norm.weight"]
        with pytest.raises(ValueError, match=r"missing: base_model\.model\.model\.norm\.weight; of wrong shape"):
            model.save_pretrained(tmp_path, state_dict=state_dict)


def test_only_the_named_adapter_is_selected_from_a_given_state():
    model = with_streams(tiny_model())
    tensors = get_peft_model_state_dict(model, {name: value + 1 for name, value in model.state_dict().items()})
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == ADAPTER_SHAPES
    expected = model.get_base_model().model.parscale.parscale_aggregator["default"][2].bias + 1
    assert torch.equal(tensors[f"{AGGREGATOR}.2.bias"], expected)


@pytest.mark.parametrize(
    ("backbone", "reason"),
    [
        ({"seed": 1}, "its weights differ .first in `model.embed_tokens.weight`."),
        ({"num_hidden_layers": 3}, 'its shape is .*"num_hidden_layers": 3'),
        ({"model_type": "llama"}, 'its shape is .*"model_type": "llama"'),
    ],
)
def test_another_backbone_is_refused_and_stays_as_it_was(tmp_path, backbone, reason):
    with_streams(tiny_model()).save_pretrained(tmp_path)
    other = tiny_model(**backbone)
    names, expected = list(other.state_dict()), logits(other)
    with pytest.raises(ValueError, match=f"The adapter was trained on another backbone than this .*: {reason}"):
        PeftModel.from_pretrained(other, tmp_path)
    assert list(other.state_dict()) == names
    assert other.config._attn_implementation == "sdpa"
    assert torch.equal(logits(other), expected)


def test_the_check_of_the_backbone_can_be_overridden_loudly(tmp_path):
    with_streams(tiny_model()).save_pretrained(tmp_path)
    other = tiny_model(seed=1)
    with pytest.warns(
        UserWarning, match=r"trained on another backbone .* Going on because of `verify_backbone=False`"
    ):
        model = PeftModel.from_pretrained(other, tmp_path, verify_backbone=False)
    assert logits(model).isfinite().all()
    model.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="trained on another backbone"):
        load(tmp_path / "again", backbone={"seed": 1})


def test_the_check_can_be_overridden_for_the_auto_class_too(tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    model = with_streams(tiny_model())
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "other")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained on another backbone"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    config = ParScaleConfig.from_pretrained(tmp_path, verify_backbone=False)
    with pytest.warns(UserWarning, match="Going on because of `verify_backbone=False`"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path, config=config)


def test_the_right_backbone_loads_without_a_warning(tmp_path):
    with_streams(tiny_model()).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        load(tmp_path)


@pytest.mark.parametrize(
    ("key", "adapter_name", "expected"),
    [
        ("a.parscale.parscale_prefix_k.default.weight", "default", "a.parscale_prefix_k"),
        ("a.parscale.parscale_aggregator.x.0.bias", "x", "a.parscale_aggregator.0.bias"),
        ("a.parscale.parscale_aggregator.0.0.bias", "0", "a.parscale_aggregator.0.bias"),
        ("model.norm.weight", "norm", "model.norm.weight"),
        ("lm_head.modules_to_save.default.weight", "default", "lm_head.modules_to_save.default.weight"),
    ],
)
def test_names_in_a_file_carry_no_adapter_name(key, adapter_name, expected):
    assert checkpoint_key(key, adapter_name) == expected
