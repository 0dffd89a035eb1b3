"""Backbones that accelerate spreads over devices, or whose weights it keeps in memory or on disk between calls."""

import functools
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model
from support.oracle import file_tensors
from support.outputs import gradients, logits
from support.peft_methods import PARSCALE, config, plain, stir, tensors_of
from support.tiny_models import random_tokens, tiny_model, with_streams
from support.traces import traces
from transformers import AutoModelForCausalLM

from parscale_adapt import ParScaleConfig
from parscale_adapt.hf.backbone import probe_backbone
from parscale_adapt.hf.engines import execution_device
from parscale_adapt.tuner.hosts import stream_layer


CPU = torch.device("cpu")


def device_map(elsewhere):
    names = {"model.layers.1": elsewhere, "model.norm": elsewhere}
    return {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "lm_head": "cpu", **names}


WAYS = {
    "memory": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: disk_offload(model, folder / "weights", execution_device=CPU),
    "a part on disk": lambda model, folder: dispatch_model(model, device_map("disk"), offload_dir=folder / "weights"),
    "hooks alone": lambda model, folder: dispatch_model(model, device_map("cpu"), force_hooks=True),
}


@pytest.fixture(params=WAYS)
def dispatched(request, tmp_path):
    """Makes a tiny backbone that accelerate dispatched in one of `WAYS`."""
    return lambda: WAYS[request.param](tiny_model(), tmp_path)


def read_from_disk(folder):
    """A backbone of which one part was never in memory."""
    tiny_model().save_pretrained(folder / "backbone")
    options = {"device_map": device_map("disk"), "offload_folder": folder / "offloaded"}
    return AutoModelForCausalLM.from_pretrained(folder / "backbone", **options)


@pytest.mark.parametrize("method", [method for method in PARSCALE if "LoRA" not in method or method == "stream LoRA"])
def test_streams_on_a_dispatched_backbone_give_what_they_give_on_a_plain_one(dispatched, method):
    results = []
    for backbone in (tiny_model(), dispatched()):
        torch.manual_seed(1)
        model = get_peft_model(backbone, config(method)).eval()
        stir(model)
        generated = model.generate(input_ids=random_tokens(), max_new_tokens=5, do_sample=False)
        fingerprint = model.peft_config["default"].backbone_fingerprint
        results.append((logits(model), generated, gradients(model), fingerprint))
        assert not any(dict(model.named_parameters())[name].is_meta for name in tensors_of(model, "default"))
        with model.disable_adapter():
            assert torch.equal(logits(model), plain())
        assert torch.equal(logits(model.unload()), plain())
    reference, found = results
    assert torch.equal(found[0], reference[0])
    assert torch.equal(found[1], reference[1])
    assert found[2].keys() == reference[2].keys() != set()
    assert all(torch.equal(gradient, reference[2][name]) for name, gradient in found[2].items())
    assert found[3] == reference[3]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_adapters_are_loaded_onto_a_dispatched_backbone_and_saved_again(dispatched, tmp_path, low_cpu_mem_usage):
    reference = with_streams(tiny_model())
    reference.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(dispatched(), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model), logits(reference))
    model.load_adapter(tmp_path / "adapter", "second", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(reference))
    assert not any(dict(model.named_parameters())[name].is_meta for name in tensors_of(model, "second"))
    model.save_pretrained(tmp_path / "again", selected_adapters=["second"])
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "again" / "second")
    assert torch.equal(logits(reloaded), logits(reference))


def test_another_backbone_is_noticed_though_its_weights_are_elsewhere(dispatched, tmp_path):
    with_streams(tiny_model(seed=1)).save_pretrained(tmp_path / "adapter")
    model = get_peft_model(dispatched(), ParScaleConfig(num_streams=1))
    with pytest.raises(ValueError, match="trained on another backbone"):
        model.load_adapter(tmp_path / "adapter", "second")


def test_prefixes_start_from_tokens_of_a_dispatched_backbone(dispatched):
    starts = []
    for backbone in (tiny_model(), dispatched()):
        torch.manual_seed(4)
        starts.append(file_tensors(with_streams(backbone, init_weights="tokens")))
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(tensor, starts[0][name]) for name, tensor in starts[1].items())


@pytest.mark.parametrize("way", ["memory", "disk"])
def test_a_model_with_streams_is_offloaded_as_a_whole(tmp_path, way):
    model = with_streams(tiny_model())
    expected = logits(model)
    model = WAYS[way](model, tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), expected)


REFUSED = {
    "train_backbone": ({"train_backbone": True}, "`train_backbone=True` trains weights"),
    "modules_to_save": ({"modules_to_save": ["norm"]}, "`modules_to_save` with 'norm' trains a copy of weights"),
    "lora": ({"lora": {"r": 2, "target_modules": ["q_proj"]}}, "`lora` wraps weights"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("way", ["memory", "disk", "a part on disk"])
def test_weights_that_are_offloaded_are_not_trained(tmp_path, way, case):
    fields, message = REFUSED[case]
    backbone = WAYS[way](tiny_model(), tmp_path)
    before = traces(backbone)
    with pytest.raises(ValueError, match=f"{message} .* but accelerate offloads `.*`: leave it out, or load"):
        get_peft_model(backbone, ParScaleConfig(num_streams=2, **fields))
    del before["parameters"]  # accelerate makes new ones in every forward
    assert traces(backbone).items() >= before.items()
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_what_is_in_memory_is_trained_beside_a_part_on_disk(tmp_path):
    model = get_peft_model(
        WAYS["a part on disk"](tiny_model(), tmp_path), ParScaleConfig(num_streams=2, modules_to_save=["lm_head"])
    )
    assert gradients(model)["base_model.model.lm_head.modules_to_save.default.weight"].any()


def test_weights_that_nothing_brings_are_refused(tmp_path):
    with_streams(tiny_model()).save_pretrained(tmp_path / "adapter")
    message = "weights are not there: `.*` is on the meta device and nothing brings it"
    for attach in (
        functools.partial(PeftModel.from_pretrained, read_from_disk(tmp_path), tmp_path / "adapter"),
        functools.partial(get_peft_model, tiny_model("deepseek_v3").to("meta"), ParScaleConfig()),
    ):
        before = traces(attach.args[0])["modules"]
        with pytest.raises(ValueError, match=message):
            attach()
        assert traces(attach.args[0])["modules"] == before


def test_a_backbone_that_was_read_from_disk_runs_in_streams_beside_a_new_adapter(tmp_path):
    reference = with_streams(tiny_model())
    reference.save_pretrained(tmp_path / "adapter")
    model = get_peft_model(read_from_disk(tmp_path), ParScaleConfig(num_streams=1))
    model.load_adapter(tmp_path / "adapter", "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(reference))


def test_blocks_that_accelerate_brings_as_a_whole_are_refused(tmp_path):
    options = {"offload_dir": tmp_path, "preload_module_classes": ["Qwen2DecoderLayer"]}
    backbone = dispatch_model(tiny_model(), device_map("disk"), **options)
    before = traces(backbone)
    with pytest.raises(ValueError, match=r"brings all weights inside `model\.layers\.1` at once"):
        with_streams(backbone)
    assert traces(backbone) == before


def test_a_module_computes_where_its_hook_says_or_where_its_weights_are():
    linear = torch.nn.Linear(2, 2, device="meta")
    assert execution_device(linear) == torch.device("meta")
    linear._hf_hook = SimpleNamespace(execution_device="cuda:1")
    assert execution_device(torch.nn.Sequential(linear)) == torch.device("cuda:1")
    linear._hf_hook = SimpleNamespace(hooks=[SimpleNamespace(), SimpleNamespace(execution_device="cpu")])
    assert execution_device(linear) == CPU


@pytest.mark.parametrize(
    ("model_type", "name", "sizes"),
    [
        ("qwen2", "model.norm", {}),
        ("gpt2", "transformer.ln_f", {}),
        ("opt", "model.decoder.final_layer_norm", {}),
        ("opt", "model.decoder.project_out", {"word_embed_proj_dim": 16}),
    ],
)
def test_the_aggregator_is_where_hidden_states_leave_and_prefixes_are_where_attention_runs(model_type, name, sizes):
    """The meta device stands in for a second one, where the last layer and what follows it are."""
    model = tiny_model(model_type, **sizes)
    backbone = probe_backbone(model)
    assert backbone.output_module == name
    first, last = backbone.attention_shapes
    model.get_submodule(name).to("meta")
    model.get_submodule(last).to("meta")
    given, devices = ParScaleConfig(num_streams=2), {}
    for key in (backbone.decoder_name, first, last):
        layer = stream_layer(model, backbone, key, {})
        layer.update_layer("default", given)
        devices[key] = {parameter.device.type for parameter in layer.parameters()}
    assert devices == {backbone.decoder_name: {"meta"}, first: {"cpu"}, last: {"meta"}}
