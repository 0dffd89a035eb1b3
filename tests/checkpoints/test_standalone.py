"""Standalone checkpoints, read by a process that has no parscale_adapt, compute what backbone and adapter computed."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from support.fresh_reader import Job, read_in_fresh_process
from support.tiny_models import random_tokens, tiny_model, with_streams
from transformers import AutoConfig, AutoModelForCausalLM

from parscale_adapt.checkpoints.exporting import export_adapter


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("standalone")]  # one fixture for all

CONV = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
    **EXPERTS,
}
SMALL_SHARDS = "10KB"
WHOLE, TIED, UNTIED = "5GB", {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
OTHER_TRANSFORM = {"num_prefix_tokens": 48}  # the default, which goes with every transform


def case(model_type, dtype, ties, shards, changes=None, **fields):
    return {
        "model_type": model_type,
        "dtype": getattr(torch, dtype),
        "changes": {**(changes or {}), **ties},
        "shards": shards,
        "fields": fields,
    }


CASES = {
    f"{model_type}-{dtype}-{'tied' if ties is TIED else 'untied'}-{'sharded' if shards is SMALL_SHARDS else 'whole'}": case(
        model_type, dtype, ties, shards, changes
    )
    for model_type, changes in {
        "qwen2": {},
        "qwen3": {},
        "llama": {},
        "gemma3_text": {},
        "gpt2": {},
        "qwen3_moe": {},
        "lfm2": CONV,
        "qwen3_next": LINEAR,
        "opt": {},
    }.items()
    for dtype, ties, shards in (("float32", UNTIED, SMALL_SHARDS), ("bfloat16", TIED, WHOLE))
}
CASES |= {
    "qwen2-float32-tied-sharded": case("qwen2", "float32", TIED, SMALL_SHARDS),
    "qwen2-float32-untied-whole": case("qwen2", "float32", UNTIED, WHOLE),
    "qwen2-bfloat16-untied-sharded": case("qwen2", "bfloat16", UNTIED, SMALL_SHARDS),
    "gpt2-float32-tied-whole": case("gpt2", "float32", TIED, WHOLE),
    "lora-per-stream": case("qwen2", "bfloat16", UNTIED, WHOLE, stream_transform="lora", **OTHER_TRANSFORM),
    "bias-per-stream": case("gpt2", "float32", TIED, WHOLE, stream_transform="bitfit", **OTHER_TRANSFORM),
    "prefix-and-lora-per-stream": case("gemma3_text", "float32", TIED, WHOLE, stream_transform=["prefix", "lora"]),
    "lora-and-bias-per-stream": case(
        "gpt2", "float32", TIED, WHOLE, stream_transform=["bitfit", "lora"], **OTHER_TRANSFORM
    ),
    "static-aggregator": case("llama", "float32", UNTIED, WHOLE, aggregator="static"),
    "mean-aggregator": case("llama", "float32", UNTIED, WHOLE, aggregator="mean"),
    "no-attention": case("mamba", "float32", UNTIED, WHOLE, stream_transform="bitfit", **OTHER_TRANSFORM),
    "trained-backbone": case("qwen2", "float32", TIED, WHOLE, train_backbone=True),
    "shared-lora": case("qwen2", "float32", UNTIED, WHOLE, lora={"r": 2, "target_modules": ["q_proj", "down_proj"]}),
}
NOT_GENERATING = ("no-attention",)  # Mamba's cache goes by another name than `past_key_values`


def padded_inputs():
    input_ids = random_tokens(batch_size=2, length=7)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :2] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def make_source(spec, folder):
    """Save a backbone and an adapter that changes it a lot; nothing of this knows of exports."""
    implementation = "eager" if spec["model_type"] == "mamba" else "sdpa"
    backbone = tiny_model(spec["model_type"], implementation, **spec["changes"]).to(spec["dtype"])
    backbone.save_pretrained(folder / "backbone")
    model = with_streams(backbone, num_streams=3, **spec["fields"])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # also matrices that start at zero
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder / "adapter")


@torch.no_grad()
def compute_source(folder, inputs, generates):
    """What PEFT, the backbone and the adapter compute."""
    backbone = AutoModelForCausalLM.from_pretrained(folder / "backbone", dtype="auto")
    model = PeftModel.from_pretrained(backbone, folder / "adapter").eval()
    generation = {**inputs, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6}
    outputs = {"logits": model(**inputs).logits}
    if generates:
        outputs |= {"greedy": model.generate(**generation), "beams": model.generate(**generation, num_beams=3)}
    return outputs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Name of a case to the folder of its export, what its source computed, and what a fresh process saw."""
    root, inputs = tmp_path_factory.mktemp("standalone"), padded_inputs()
    expected, jobs = {}, []
    for name, spec in CASES.items():
        make_source(spec, root / name)
        expected[name] = compute_source(root / name, inputs, generates := name not in NOT_GENERATING)
        export_adapter(
            str(root / name / "adapter"),
            root / name / "export",
            backbone=str(root / name / "backbone"),
            max_shard_size=spec["shards"],
        )
        jobs.append(Job(root / name / "export", inputs, generates))
    (root / "scratch").mkdir()
    seen = read_in_fresh_process(jobs, root / "scratch")
    return {name: (root / name / "export", expected[name], *result) for name, result in zip(CASES, seen)}


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_process_computes_what_the_source_computed(runs, name):
    _, expected, facts, outputs = runs[name]
    assert facts["problems"] == {}
    is_merged_in_float32 = CASES[name]["dtype"] is torch.float32
    tolerance = 1e-5 if is_merged_in_float32 else 1e-2
    visible = padded_inputs()["attention_mask"].bool()
    torch.testing.assert_close(outputs["logits"][visible], expected["logits"][visible], atol=tolerance, rtol=0)
    for generated in expected.keys() - {"logits"}:
        assert torch.equal(outputs[generated], expected[generated]), generated


@pytest.mark.parametrize("name", CASES)
def test_dtype_and_tying_are_those_of_the_backbone_and_streams_stay_in_float32(runs, name):
    _, _, facts, _ = runs[name]
    assert facts["dtype"] == str(CASES[name]["dtype"])
    assert facts["tied"] == CASES[name]["changes"]["tie_word_embeddings"]
    assert set(facts["stream_dtypes"]) <= {"torch.float32"}


@pytest.mark.parametrize("name", CASES)
def test_what_was_loaded_can_be_saved_again(runs, name):
    _, _, facts, outputs = runs[name]
    assert torch.equal(outputs["logits_again"], outputs["logits"])
    assert torch.equal(outputs["states_again"], outputs["states"])  # of the base model alone
    assert {"config.json", "modeling_parscale.py"} <= set(facts["again"])


def tensor_names(folder):
    names = set()
    for path in folder.glob("*.safetensors"):
        if path.name != "reference_logits.safetensors":
            with safe_open(path, "pt") as reader:
                names |= set(reader.keys())
    return names


@pytest.mark.parametrize("name", CASES)
def test_backbone_tensors_keep_the_names_that_transformers_gives_them(runs, name):
    folder = runs[name][0]
    ours = {tensor for tensor in tensor_names(folder) if ".parscale." in f".{tensor}"}
    assert tensor_names(folder) - ours == tensor_names(folder.parent / "backbone")


@pytest.mark.parametrize("name", CASES)
def test_shards_are_as_small_as_asked_for(runs, name):
    folder = runs[name][0]
    is_sharded = CASES[name]["shards"] == SMALL_SHARDS
    assert (folder / "model.safetensors").is_file() == (not is_sharded)
    if is_sharded:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == tensor_names(folder)
        assert len(set(index["weight_map"].values())) > 2


def test_classes_are_a_model_and_a_thin_causal_lm_named_after_the_backbone(runs):
    facts = {name: runs[name][2] for name in CASES}
    assert facts["gpt2-float32-tied-whole"]["class"] == "ParScaleGPT2ForCausalLM"
    assert facts["gpt2-float32-tied-whole"]["base_class"] == "ParScaleGPT2Model"
    assert facts["qwen3_moe-float32-untied-sharded"]["class"] == "ParScaleQwen3MoeForCausalLM"
    assert facts["opt-float32-untied-sharded"]["base_class"] == "ParScaleOPTModel"


def test_stock_transformers_does_not_take_an_export_for_the_plain_backbone(runs):
    folder = runs["qwen2-float32-untied-whole"][0]
    assert json.loads((folder / "config.json").read_text())["model_type"] == "parscale_qwen2"
    for auto_class in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            auto_class.from_pretrained(folder, trust_remote_code=False)
