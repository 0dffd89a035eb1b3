"""Continual pretraining in one process: what is trained, what is left alone, and what a run leaves behind."""

import hashlib
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.quantized import load_in_4bit
from support.recipe_runs import PROBE, reloaded_logits


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def test_a_frozen_run_leaves_the_backbone_alone(recipes, material):
    before = hashes(material.backbone)
    result = recipes.run("cpt", **material.cpt_options()).check()
    assert hashes(material.backbone) == before
    assert len({batch["frozen"] for batch in result.batches()}) == 1
    assert all("parscale_" in name for name in result.tensors)
    assert torch.equal(reloaded_logits(result.output_dir), result.logits())


def test_a_full_run_reloads_to_the_same_logits(recipes, material):
    before = hashes(material.backbone)
    result = recipes.run("cpt", **material.cpt_options(train_backbone=True)).check()
    assert hashes(material.backbone) == before
    original = load_file(Path(material.backbone) / "model.safetensors")
    trained = {name.removeprefix("base_model.model."): tensor for name, tensor in result.tensors.items()}
    assert original.keys() <= trained.keys()
    assert not any(torch.equal(trained[name], original[name]) for name in original)
    assert torch.equal(reloaded_logits(result.output_dir), result.logits())


def test_one_stream_is_plain_training(recipes, material):
    result = recipes.run("cpt", **material.cpt_options(num_streams=1, train_backbone=True)).check()
    assert not any("parscale_" in name for name in result.tensors)
    assert torch.equal(reloaded_logits(result.output_dir), result.logits())


def test_what_a_run_leaves_behind(recipes, material):
    result = recipes.run("cpt", **material.cpt_options()).check()
    files = {path.name for path in result.output_dir.iterdir()}
    assert files >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "log.jsonl",
        "loss_curve.png",
        "metrics.json",
        "README.md",
        "run.json",
        "tokenizer.json",
        "verified_save.json",
    }
    metrics = result.metrics
    assert metrics["num_streams"] == 2
    assert metrics["num_steps"] == len(result.losses) == 4
    assert metrics["num_tokens"] == 4 * 4 * 64
    assert metrics["sources"]["sources"][0]["tokens_dropped"] == 0
    assert metrics["heldout_loss"] > 0
    entry = metrics["log_history"][0]
    assert sum(entry[f"stream_weight/{stream}"] for stream in range(2)) == pytest.approx(1, abs=1e-5)
    card = (result.output_dir / "README.md").read_text()
    assert f"{metrics['heldout_loss']:.4f} nats per token" in card
    assert material.text in card
    assert f"{metrics['heldout_loss']:.4f} nats per token" in result.stdout().rpartition("Trained")[2]


def test_different_seeds_start_differently_and_the_same_seed_alike(recipes, material):
    losses = [recipes.run("cpt", **material.cpt_options(seed=seed, max_steps=1)).check().losses for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    "changes",
    [{}, {"dtype": "bfloat16", "bf16": True, "gradient_checkpointing": True, "init_weights": "tokens"}],
    ids=["float32", "bfloat16_checkpointed_tokens"],
)
def test_a_4bit_backbone_carries_streams(recipes, material, changes):
    pytest.importorskip("bitsandbytes")
    options = material.cpt_options(load_in_4bit=True, max_steps=8, **changes)
    result = recipes.run("cpt", **options).check()
    batches = result.batches()
    assert batches[0]["kinds"] == ["whole", "whole float32"]
    assert len({batch["frozen"] for batch in batches}) == 1

    dtype = getattr(torch, changes.get("dtype", "float32"))
    backbone = load_in_4bit(material.backbone, dtype)
    with torch.no_grad():
        plain = backbone(input_ids=PROBE).logits.float()
        model = PeftModel.from_pretrained(backbone, result.output_dir).eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=changes.get("bf16", False)):
            logits = model(input_ids=PROBE, use_cache=False).logits.float()
    difference = (logits - result.logits().float()).abs().max()
    assert difference <= (1e-6 if not changes else 0.05)
    assert (plain - logits).abs().max() > 3 * difference + 1e-3
