"""Trainers that sample answers under an engine on two processes: what is seen, saved and resumed there."""

import pytest
import torch
from support.engine_runs import TWO_PROCESSES, assert_agree, assert_saved, runs_of


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("engines")]

SAVES = {"save_strategy": "steps", "save_steps": 2}
FROM_ADAPTER = {"num_streams": None, "num_prefix_tokens": None}
GRPO = {"per_device_train_batch_size": 4, "beta": 0.1, "gradient_checkpointing": True}


@pytest.fixture(scope="module")
def teacher(recipes, material):
    options = material.sft_options(num_streams=4, num_prefix_tokens=6, max_steps=8, learning_rate=3e-2)
    return recipes.run("sft", **options).check().output_dir


@pytest.fixture(scope="module")
def distilled(recipes, material, teacher):
    """In one process."""
    return recipes.run("distill", **material.distillation_options(teacher, **SAVES)).check()


def described_runs(folder, material, teacher, engine):
    on_engine = {"fsdp_on_cpu": engine == "fsdp2", **SAVES}
    grpo = material.prompt_options(**on_engine, **GRPO)
    distill = material.distillation_options(teacher, **on_engine, **TWO_PROCESSES, gradient_checkpointing=True)
    own_answers = {
        "train_on_data": False,
        "max_completion_length": 8,
        "max_steps": 2,
        "num_streams": 1,
        "lora": '{"r": 2}',
    }
    return {
        "grpo": ("grpo", grpo),
        "grpo resumed": ("grpo", {**grpo, "resume_from_checkpoint": folder / "grpo" / "checkpoint-2"}),
        "grpo full": ("grpo", {**grpo, "train_backbone": True, "max_steps": 2}),
        "distill": ("distill", distill),
        "distill resumed": ("distill", {**distill, "resume_from_checkpoint": folder / "distill" / "checkpoint-2"}),
        "distill own answers": ("distill", {**distill, **own_answers, "num_prefix_tokens": None}),
    }


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_answers_are_sampled_and_learned_from_under_an_engine(recipes, material, teacher, distilled, tmp_path, engine):
    if engine == "zero3":
        pytest.importorskip("deepspeed")
    results = runs_of(engine, tmp_path, described_runs(tmp_path, material, teacher, engine))
    kind = {"zero3": "ZeRO-3", "fsdp2": "DTensor"}[engine]
    for ranks in results.values():
        result = ranks[0].check()
        assert f"{kind} float32" in result.batches()[0]["kinds"], "not sharded"
        assert result.batches(0)[0]["ids"] != ranks[1].batches(1)[0]["ids"], "both ranks sampled the same"
        assert_saved(result)
    for name in ("grpo", "grpo full"):
        divergences = [entry["kl"] for entry in results[name][0].metrics["log_history"] if "kl" in entry]
        assert divergences[0] == pytest.approx(0, abs=1e-6)
        assert divergences[1] > 1e-6
    for name in ("grpo", "distill"):
        result, resumed = results[name][0], results[f"{name} resumed"][0]
        assert resumed.losses == result.losses
        assert resumed.metrics["heldout"] == result.metrics["heldout"]
        assert all(torch.equal(resumed.tensors[key], tensor) for key, tensor in result.tensors.items())
    assert_agree(results["distill"][0], distilled)
    check_heldout_reward_without_an_engine(recipes, material, results["grpo"][0])


def check_heldout_reward_without_an_engine(recipes, material, result):
    """Greedy answers of the saved streams earn in one process what they earned on two."""
    start = {"adapter_name_or_path": result.output_dir, **FROM_ADAPTER, "learning_rate": 1e-9, "max_steps": 1}
    alone = recipes.run("grpo", **material.prompt_options(**start)).check()
    assert alone.metrics["heldout"] == pytest.approx(result.metrics["heldout"], abs=1e-6)
