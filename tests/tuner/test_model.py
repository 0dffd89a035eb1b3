import copy
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.outputs import logits
from support.tiny_models import ARCHITECTURES, random_tokens, tiny_config, tiny_model, with_streams
from support.traces import traces
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from parscale_adapt import ParScaleConfig


def config(num_streams, **fields):
    return ParScaleConfig(task_type="CAUSAL_LM", num_streams=num_streams, num_prefix_tokens=3, init_std=0.5, **fields)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_one_stream_is_the_backbone_to_the_last_bit_and_adds_no_tensor(model_type):
    backbone = tiny_model(model_type, "eager")
    names, expected = list(backbone.state_dict()), logits(backbone)
    model = with_streams(backbone, num_streams=1)
    assert torch.equal(logits(model), expected)
    assert list(backbone.state_dict()) == names
    assert model.get_nb_trainable_parameters()[0] == 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_disabling_gives_the_backbone_to_the_last_bit_and_enabling_gives_the_streams_back(implementation):
    backbone = tiny_model(implementation=implementation)
    expected = logits(backbone)
    model = with_streams(backbone)
    with_adapter = logits(model)
    assert not torch.equal(with_adapter, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), with_adapter)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), expected)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), with_adapter)


def adapters_alone():
    """Outputs of adapters of 1, 2, 4 and 8 streams, each alone on its backbone, and a model that holds all."""
    alone, together = {}, with_streams(tiny_model(), num_streams=2, adapter_name="p2")
    for num_streams in (1, 2, 4, 8):
        name = f"p{num_streams}"
        if num_streams != 2:
            together.add_adapter(name, config(num_streams))
        single = with_streams(tiny_model(), num_streams, adapter_name=name)
        tensors = {key: value for key, value in together.state_dict().items() if f".{name}." in key}
        assert set(tensors) == {key for key in single.state_dict() if "parscale" in key}
        single.load_state_dict(tensors, strict=False)
        alone[name] = logits(single)
    return alone, together


def test_after_any_order_of_switches_an_adapter_gives_what_it_gives_alone():
    alone, model = adapters_alone()
    for name in ("p2", "p8", "p1", "p4", "p2", "p1", "p8"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), alone[name])
        trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable == {key for key, _ in model.named_parameters() if f".{name}." in key}


def test_deleting_an_adapter_removes_its_tensors_and_keeps_the_others():
    alone, model = adapters_alone()
    model.set_adapter("p4")
    model.delete_adapter("p2")
    model.delete_adapter("p1")
    assert not any(".p2." in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model), alone["p4"])
    with pytest.warns(UserWarning, match="Setting active adapter to p8"):
        model.delete_adapter("p4")
    assert torch.equal(logits(model), alone["p8"])
    model.delete_adapter("p8")
    assert torch.equal(logits(model.base_model.model), logits(tiny_model()))


@pytest.mark.parametrize("num_streams", [1, 4])
def test_a_deleted_name_can_be_used_again_with_other_streams(num_streams):
    model = with_streams(tiny_model(), num_streams=2)
    model.add_adapter("other", config(2))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", config(num_streams))
    model.set_adapter("default")
    assert logits(model).isfinite().all()
    assert model.get_base_model().model.parscale.num_streams == num_streams


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("num_streams", [1, 4])
def test_unloading_leaves_no_trace(num_streams, implementation):
    backbone = tiny_model(implementation=implementation)
    before, expected = traces(backbone), logits(backbone)
    model = with_streams(backbone, num_streams)
    model.add_adapter("other", config(2))
    logits(model)
    unloaded = model.unload()
    assert unloaded is backbone
    assert traces(backbone) == before
    assert torch.equal(logits(backbone), expected)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*peft_config.*")
        assert not torch.equal(logits(with_streams(backbone)), expected)


def test_merging_gives_a_model_of_its_own_with_the_same_output_and_parameters():
    backbone = tiny_model()
    weight = backbone.model.layers[0].mlp.up_proj.weight
    model = with_streams(backbone, num_streams=4)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), expected)
    assert merged.model.layers[0].mlp.up_proj.weight is weight
    single = with_streams(tiny_model(), num_streams=1)
    assert torch.equal(logits(single.merge_and_unload()), logits(tiny_model()))


def test_two_adapters_at_once_are_refused():
    model = with_streams(tiny_model())
    model.add_adapter("other", config(2))
    with pytest.raises(
        ValueError, match=r"Only one ParScale adapter can be active at a time, got \['default', 'other"
    ):
        model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default"]
    model.base_model.set_adapter(["other"])
    assert model.get_base_model().model.parscale.current_adapter == "other"


@pytest.mark.parametrize("second_owns", [False, True])
def test_an_adapter_that_owns_the_backbone_shares_it_with_no_other(second_owns):
    model = with_streams(tiny_model(), train_backbone=not second_owns)
    expected = logits(model)
    owner, other = ("other", "default") if second_owns else ("default", "other")
    message = (
        rf"Adapter '{owner}' has `train_backbone=True` and so owns the backbone; it can't share it with \['{other}"
    )
    with pytest.raises(ValueError, match=message):
        model.add_adapter("other", config(2, train_backbone=second_owns))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


def test_other_methods_beside_streams_are_refused():
    model = with_streams(tiny_model())
    expected = logits(model)
    with pytest.raises(ValueError, match="peft types"):
        model.add_adapter("low rank", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert torch.equal(logits(model), expected)


def quantized_model():
    model = tiny_model()
    model.is_quantized = True
    return model


REFUSED = {
    "encoder-decoder": (
        lambda: AutoModelForSeq2SeqLM.from_config(tiny_config("bart")).eval(),
        {},
        "BartForConditionalGeneration is an encoder-decoder model; streams need a decoder-only model",
    ),
    "no attention": (
        lambda: AutoModelForCausalLM.from_config(tiny_config("mamba")).eval(),
        {},
        "MambaForCausalLM has no attention that streams can reach",
    ),
    "unreachable attention": (
        lambda: AutoModelForCausalLM.from_config(tiny_config("falcon")).eval(),
        {},
        "FalconForCausalLM has no attention that streams can reach",
    ),
    "no LM head": (lambda: tiny_model().model, {}, "Qwen2Model is not a causal LM with an LM head"),
    "implementation": (
        lambda: tiny_model("gpt2", "sdpa"),
        {"set": "flash_attention_9"},
        "`attn_implementation` must be one of eager, sdpa, .* for streams, got 'flash_attention_9'",
    ),
    "quantized and trained": (
        quantized_model,
        {"train_backbone": True},
        "`train_backbone=True` needs a backbone in full precision, got a quantized one",
    ),
    "streams of its own": (
        lambda: with_streams(tiny_model()).merge_and_unload(),
        {},
        "ParScaleQwen2ForCausalLM already runs in streams of its own: put adapters on its plain backbone",
    ),
}


FOR_PREFIXES_ONLY = ("no attention", "unreachable attention")


@pytest.mark.parametrize(
    ("case", "num_streams"), [(case, P) for case in REFUSED for P in (1, 2) if P == 2 or case not in FOR_PREFIXES_ONLY]
)
def test_a_refused_backbone_stays_as_it_was(case, num_streams):
    make, fields, message = REFUSED[case]
    backbone, fields = make(), dict(fields)
    if "set" in fields:
        backbone.config._attn_implementation_internal = fields.pop("set")
    inputs = {"input_ids": random_tokens()}
    if backbone.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = random_tokens()
    before = traces(backbone)
    expected = None if case == "implementation" else backbone(**inputs)[0]
    with pytest.raises(ValueError, match=message):
        get_peft_model(backbone, config(num_streams, **fields))
    assert traces(backbone) == before
    if expected is not None:
        assert torch.equal(backbone(**inputs)[0], expected)


def test_a_module_that_is_no_transformers_model_is_refused():
    with pytest.raises(TypeError, match="`model` must be a transformers model, got Linear"):
        get_peft_model(torch.nn.Linear(2, 2), ParScaleConfig())


@pytest.mark.parametrize("train_backbone", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2"])
def test_only_what_is_asked_for_is_trainable(model_type, train_backbone):
    model = with_streams(tiny_model(model_type), train_backbone=train_backbone)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    expected = set() if train_backbone else {name for name, _ in model.named_parameters() if "parscale" not in name}
    assert frozen == expected


def test_a_trained_backbone_with_one_stream_is_trainable_as_a_whole():
    model = with_streams(tiny_model(), num_streams=1, train_backbone=True)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_the_adapter_is_kept_in_float32_unless_asked_otherwise(dtype, autocast_adapter_dtype):
    backbone = tiny_model().to(dtype)
    model = get_peft_model(backbone, config(2), autocast_adapter_dtype=autocast_adapter_dtype)
    found = {parameter.dtype for name, parameter in model.named_parameters() if "parscale" in name}
    assert found == {torch.float32 if autocast_adapter_dtype else dtype}
    assert logits(model).dtype == dtype
    assert logits(model).isfinite().all()


def test_new_tensors_start_from_init_std():
    model = get_peft_model(tiny_model(hidden_size=64, head_dim=16), ParScaleConfig(num_streams=4, init_std=0.03))
    for name, parameter in model.named_parameters():
        if "parscale" in name and name.endswith("bias"):
            assert not parameter.any()
        elif "parscale" in name and parameter.numel() > 1000:
            assert parameter.std().item() == pytest.approx(0.03, rel=0.05), name


def test_the_reports_of_peft_work(capsys):
    model = with_streams(tiny_model(), num_streams=2)
    model.print_trainable_parameters()
    prefixes, aggregator = 2 * 2 * (2 * 2 * 3 * 8), (64 * 32 + 32) + (32 * 2 + 2)
    assert model.get_nb_trainable_parameters()[0] == prefixes + aggregator
    assert f"trainable params: {prefixes + aggregator:,}" in capsys.readouterr().out
    layers = model.get_layer_status()
    assert sorted(layer.name for layer in layers) == [
        "model.model.layers.0.self_attn.parscale",
        "model.model.layers.1.self_attn.parscale",
        "model.model.parscale",
    ]
    assert all(layer.active_adapters == ["default"] and layer.requires_grad == {"default": True} for layer in layers)
    status = model.get_model_status()
    assert status.peft_types == {"default": "PARSCALE"}
    assert (status.enabled, status.active_adapters, status.num_adapter_layers) == (True, ["default"], 3)


def test_the_model_card_of_peft_is_written(tmp_path):
    with_streams(tiny_model()).create_or_update_model_card(tmp_path)
    assert "library_name: peft" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_importing_the_package_registers_the_method_in_a_fresh_process():
    code = (
        "import peft, parscale_adapt\n"
        "from transformers import AutoConfig\n"
        "config = peft.get_peft_config({'peft_type': 'PARSCALE', 'num_streams': 3, 'task_type': 'CAUSAL_LM'})\n"
        "print(type(config).__name__, config.num_streams, AutoConfig.for_model('qwen2_parscale', parscale_n=2).parscale_n)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["ParScaleConfig", "3", "2"]


def test_a_copy_of_the_model_is_independent():
    model = with_streams(tiny_model())
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "parscale" in name:
                parameter.zero_()
    assert not torch.equal(logits(twin), expected)
    twin.unload()
    assert torch.equal(logits(model), expected)


def test_the_backbone_inside_saves_itself_as_a_plain_model(tmp_path):
    model = with_streams(tiny_model()).unload()
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(reloaded), logits(tiny_model()))
