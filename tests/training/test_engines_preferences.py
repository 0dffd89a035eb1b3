"""DPO and reward models under an engine on two processes, against one process with the same global batch; and resumed."""

import math

import pytest
import torch
from support.engine_runs import TWO_PROCESSES, assert_agree, assert_saved, runs_of


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("engines")]

RUNS = {
    "dpo frozen": ("dpo", {"gradient_checkpointing": True}),
    "dpo full": ("dpo", {"train_backbone": True}),
    "reward frozen": ("reward", {"gradient_checkpointing": True}),
    "reward full": ("reward", {"train_backbone": True}),
}
SAVES = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def alone(recipes, material):
    """The runs in one process."""
    return {
        name: recipes.run(recipe, **material.pair_options(**SAVES, **changes)).check()
        for name, (recipe, changes) in RUNS.items()
    }


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_pairs_are_learned_from_under_an_engine_as_in_one_process(material, alone, tmp_path, engine):
    if engine == "zero3":
        pytest.importorskip("deepspeed")
    options = material.pair_options(fsdp_on_cpu=engine == "fsdp2", **TWO_PROCESSES, **SAVES)
    described = {}
    for name, (recipe, changes) in RUNS.items():
        described[name] = (recipe, {**options, **changes})
        resumed = {"resume_from_checkpoint": tmp_path / name / "checkpoint-2"}
        described[f"{name} resumed"] = (recipe, {**options, **changes, **resumed})
    start = {"num_streams": None, "num_prefix_tokens": None, "max_steps": 2}
    for name in ("dpo frozen", "reward frozen"):
        changes = {"adapter_name_or_path": tmp_path / name, **start}
        described[f"reward from {name}"] = ("reward", {**options, **changes})
    results = runs_of(engine, tmp_path, described)
    for name in ("dpo frozen", "reward frozen"):
        assert_saved(results[f"reward from {name}"][0].check())
    for name, (recipe, changes) in RUNS.items():
        result, resumed = results[name][0].check(), results[f"{name} resumed"][0].check()
        kind = {"zero3": "ZeRO-3", "fsdp2": "DTensor"}[engine]
        assert f"{kind} float32" in result.batches()[0]["kinds"], "not sharded"
        assert_agree(result, alone[name])
        assert result.metrics["heldout"] == pytest.approx(alone[name].metrics["heldout"], abs=1e-4)
        assert_saved(result)
        if recipe == "dpo":
            assert result.losses[0] == pytest.approx(math.log(2), abs=1e-4)
        assert resumed.losses == result.losses
        assert all(torch.equal(resumed.tensors[key], tensor) for key, tensor in result.tensors.items())
        assert changes.get("train_backbone", False) == any("embed_tokens" in key for key in result.tensors)
