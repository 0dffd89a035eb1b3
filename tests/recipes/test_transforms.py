"""The recipes with other transforms and aggregators, and shared LoRA in their trainer."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from support.quantized import load_in_4bit
from support.recipe_runs import PROBE, probe_logits, refusal, reloaded_logits
from support.tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from parscale_adapt import ParScaleConfig
from parscale_adapt.training.resuming import check_resumable
from parscale_adapt.training.saving import live_tensors, verify_save, whole_state


def test_a_near_identity_start_is_said_before_the_first_step(recipes, material):
    result = recipes.run("cpt", **material.cpt_options(init_weights="near_identity", max_steps=2)).check()
    start = result.metrics["near_identity_start"]
    assert (
        f"Near-identity start: before the first step the loss differs from the backbone's by {start['difference']:+.4f}"
        in (result.stdout())
    )
    assert recipes.run("cpt", **material.cpt_options(max_steps=1)).check().metrics["near_identity_start"] is None


@pytest.mark.parametrize(
    ("transform", "aggregator"), [("lora", "static"), ("bitfit", "mean"), (["prefix", "lora"], "dynamic")], ids=str
)
def test_a_run_reloads_to_the_same_logits_and_is_resumed_bit_for_bit(recipes, material, transform, aggregator):
    options = material.cpt_options(stream_transform=transform, aggregator=aggregator, num_prefix_tokens=None)
    options |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "learning_rate": 1e-2}
    result = recipes.run("cpt", **options).check()
    assert result.adapter_config["stream_transform"] == transform
    assert result.adapter_config["aggregator"] == aggregator
    mark = "parscale_bias" if transform == "bitfit" else "parscale_lora_B"
    assert sum(mark in name for name in result.tensors) == 2 * 7
    assert any("parscale_aggregator" in name for name in result.tensors) == (aggregator != "mean")
    assert sum(result.losses[4:]) < sum(result.losses[:4])
    assert torch.equal(reloaded_logits(result.output_dir), result.logits())
    checkpoint = str(result.output_dir / "checkpoint-2")
    resumed = recipes.run("cpt", result.output_dir, **options, resume_from_checkpoint=checkpoint).check()
    assert torch.equal(resumed.logits(), result.logits())


def test_the_backbone_trains_with_the_streams(recipes, material):
    options = material.cpt_options(stream_transform="lora", num_prefix_tokens=None, train_backbone=True)
    result = recipes.run("cpt", **options).check()
    assert torch.equal(reloaded_logits(result.output_dir), result.logits())


@pytest.mark.parametrize("transform", ["lora", "bitfit"])
def test_a_4bit_backbone_carries_transforms(recipes, material, transform):
    pytest.importorskip("bitsandbytes")
    options = material.cpt_options(stream_transform=transform, num_prefix_tokens=None, load_in_4bit=True)
    result = recipes.run("cpt", **options).check()
    plain = probe_logits(load_in_4bit(material.backbone))
    found = probe_logits(PeftModel.from_pretrained(load_in_4bit(material.backbone), result.output_dir))
    torch.testing.assert_close(found, result.logits(), atol=1e-5, rtol=0)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("num_streams", [1, 2])
def test_cpt_trains_a_lora_that_all_streams_share_and_goes_on_with_it(recipes, material, num_streams):
    """One stream with it is a plain LoRA."""
    lora = json.dumps({"r": 2, "target_modules": ["q_proj", "v_proj"]})
    streams = {"num_streams": num_streams, "num_prefix_tokens": 4 if num_streams > 1 else None}
    options = material.cpt_options(**streams, lora=lora, learning_rate=None, save_strategy="steps", save_steps=2)
    result = recipes.run("cpt", **options).check()
    assert result.adapter_config["lora"]["r"] == 2
    assert sum("lora_B" in name for name in result.tensors) == 2 * 2
    assert any("parscale_prefix" in name for name in result.tensors) == (num_streams > 1)
    assert all(tensor.count_nonzero() for name, tensor in result.tensors.items() if "lora_B" in name)
    assert torch.equal(reloaded_logits(result.output_dir), result.logits())
    checkpoint = str(result.output_dir / "checkpoint-2")
    resumed = recipes.run("cpt", result.output_dir, **options, resume_from_checkpoint=checkpoint).check()
    assert torch.equal(resumed.logits(), result.logits())

    start = {"adapter_name_or_path": result.output_dir, **dict.fromkeys([*streams, "lora"])}
    further = recipes.run("cpt", **material.cpt_options(**start, lora_learning_rate=1e-2)).check()
    assert further.adapter_config["lora"]["r"] == 2
    other = material.cpt_options(**start) | {"lora": json.dumps({"r": 4})}
    assert "`lora` is {'r': 4, 'lora_alpha': 8" in refusal(recipes.run("cpt", **other))


def test_lora_is_a_mapping_in_yaml(recipes, material, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"lora": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}}))
    result = recipes.run("cpt", **material.cpt_options(config=config, max_steps=1)).check()
    assert result.adapter_config["lora"]["lora_alpha"] == 4
    assert sum("lora_B" in name for name in result.tensors) == 2 * 7


def test_a_4bit_backbone_carries_shared_lora(material, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = ParScaleConfig(
        task_type="CAUSAL_LM", num_streams=2, stream_transform="lora", lora={"r": 2, "target_modules": ["q_proj"]}
    )
    model = get_peft_model(load_in_4bit(material.backbone), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model(input_ids=PROBE, labels=PROBE, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.any(), name
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(load_in_4bit(material.backbone), tmp_path)
    torch.testing.assert_close(probe_logits(reloaded), probe_logits(model), atol=1e-5, rtol=0)


def test_saves_with_shared_lora_are_whole_and_verified(tmp_path):
    config = ParScaleConfig(task_type="CAUSAL_LM", num_streams=2, num_prefix_tokens=3, lora={"r": 2})
    model = get_peft_model(tiny_model(), config)
    state = whole_state(model, "default")
    assert state.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.save_pretrained(tmp_path, state_dict=state)
    assert verify_save(model, tmp_path, "default") == len(state) == len(dict(live_tensors(model, "default")))
    with torch.no_grad():
        model.get_base_model().model.layers[1].self_attn.v_proj.lora_B["default"].weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"v_proj\.lora_B\.weight differs from the live tensor"):
        verify_save(model, tmp_path, "default")


def test_the_trained_adapter_is_found_by_the_auto_class(recipes, material):
    result = recipes.run("sft", **material.sft_options(stream_transform="bitfit", num_prefix_tokens=None)).check()
    model = AutoPeftModelForCausalLM.from_pretrained(result.output_dir)
    assert model.peft_config["default"].stream_transform == "bitfit"
    assert {name for name, _ in model.named_parameters() if "parscale_bias" in name} != set()
    plain = AutoModelForCausalLM.from_pretrained(material.backbone)
    assert (probe_logits(model) - probe_logits(plain)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"stream_transform": "bitfit"}, "stream_transform"),
        ({"stream_transform": "lora", "stream_lora_rank": 4}, "stream_lora_rank"),
        ({"stream_transform": ["prefix", "lora"]}, "stream_transform"),
        ({"stream_transform": "lora", "aggregator": "mean"}, "aggregator"),
        ({"stream_transform": "lora", "lora": {"r": 3}}, "lora"),
    ],
)
def test_a_checkpoint_of_other_streams_is_not_resumed(tmp_path, changes, name):
    saved = ParScaleConfig(stream_transform="lora", lora={"r": 2}, backbone_fingerprint={"shape": "{}"})
    saved.save_pretrained(tmp_path)
    check_resumable(saved, tmp_path)
    here = {"lora": {"r": 2}, **changes}
    with pytest.raises(ValueError, match=f"can't be resumed: its `{name}` is"):
        check_resumable(ParScaleConfig(backbone_fingerprint={"shape": "{}"}, **here), tmp_path)


def test_a_checkpoint_from_before_the_new_fields_is_resumed(tmp_path):
    config = ParScaleConfig(backbone_fingerprint={"shape": "{}"})
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    new = ("stream_transform", "stream_lora_rank", "stream_lora_alpha", "aggregator", "lora")
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in fields.items() if name not in new}))
    check_resumable(config, tmp_path)
    with pytest.raises(ValueError, match="its `aggregator` is 'dynamic', this run's is 'static'"):
        check_resumable(ParScaleConfig(aggregator="static", backbone_fingerprint={"shape": "{}"}), tmp_path)
