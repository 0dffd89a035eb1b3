"""Training killed at a random step and resumed gives the same batches, losses and weights, bit for bit."""

import random

import pytest
import torch
import yaml
from safetensors.torch import load_file


NUM_STEPS, SAVE_STEPS = 6, 2


def mixture(material, **fields):
    return [
        {"path": material.text, "weight": 3, **fields},
        {"path": material.other_text, "weight": 1, **fields},
    ]


SETUPS = {
    "map_style_frozen": lambda material: {"gradient_accumulation_steps": 4},
    "map_style_mixture_full": lambda material: {
        "train_backbone": True,
        "dataset_name": None,
        "datasets": mixture(material),
        "gradient_accumulation_steps": 4,
    },
    "streaming_frozen": lambda material: {"streaming": True, "dataloader_num_workers": 1},
    "streaming_mixture_full": lambda material: {
        "train_backbone": True,
        "dataset_name": None,
        "datasets": mixture(material, streaming=True),
        "gradient_accumulation_steps": 4,
        "shuffle_buffer_size": 8,
    },
    "reparameterized": lambda material: {"init_weights": "reparameterized", "save_total_limit": 1},
}


def options_of(setup, material, folder):
    """Arguments; lists of sources can only come from a file."""
    options = material.cpt_options(per_device_train_batch_size=2, max_steps=NUM_STEPS, **SETUPS[setup](material))
    options |= {"save_strategy": "steps", "save_steps": SAVE_STEPS}
    datasets = options.pop("datasets", None)
    if datasets is not None:
        config = folder / "datasets.yaml"
        config.write_text(yaml.safe_dump({"datasets": datasets}))
        options["config"] = config
    return options


def trained_on(result):
    return [(batch["step"], batch["ids"], batch["loss"]) for batch in result.batches()]


def assert_same_end(resumed, whole):
    assert resumed.losses == whole.losses
    assert resumed.metrics["heldout_loss"] == whole.metrics["heldout_loss"]
    assert resumed.metrics["num_tokens"] == whole.metrics["num_tokens"]
    assert resumed.metrics["sources"] == whole.metrics["sources"]
    assert resumed.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in whole.tensors.items())


@pytest.mark.parametrize("setup", SETUPS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(recipes, material, tmp_path, setup):
    options = options_of(setup, material, tmp_path)
    accumulation = options.get("gradient_accumulation_steps", 1)
    kill_at = random.randrange(SAVE_STEPS * accumulation, NUM_STEPS * accumulation)
    whole = recipes.run("cpt", tmp_path / "whole", **options).check()
    killed = recipes.run("cpt", tmp_path / "killed", kill_at_batch=kill_at, **options)
    resumed = recipes.run("cpt", tmp_path / "killed", resume_from_checkpoint=True, **options).check()

    last_save = kill_at // accumulation // SAVE_STEPS * SAVE_STEPS
    assert killed.exit_code == -9
    assert len(trained_on(whole)) == NUM_STEPS * accumulation
    assert len({ids for _, ids, _ in trained_on(whole)}) == NUM_STEPS * accumulation
    assert trained_on(killed) == trained_on(whole)[:kill_at]
    assert trained_on(resumed) == trained_on(whole)[last_save * accumulation :], f"killed before batch {kill_at}"
    assert_same_end(resumed, whole)


def test_a_half_written_checkpoint_is_passed_over(recipes, material, tmp_path):
    options = material.cpt_options(max_steps=NUM_STEPS, save_strategy="steps", save_steps=SAVE_STEPS)
    whole = recipes.run("cpt", tmp_path / "whole", **options).check()
    killed = recipes.run("cpt", tmp_path / "killed", kill_in_save=4, **options)
    assert killed.exit_code == -9
    half_written = tmp_path / "killed" / "checkpoint-4"
    assert (half_written / "adapter_model.safetensors").is_file()
    assert not (half_written / "verified_save.json").exists()

    refused = recipes.run("cpt", tmp_path / "killed", **{**options, "resume_from_checkpoint": half_written})
    assert (refused.exit_code, len(refused.errors())) == (1, 1)
    assert "no complete checkpoint" in refused.errors()[0]

    resumed = recipes.run("cpt", tmp_path / "killed", resume_from_checkpoint=True, **options).check()
    assert trained_on(resumed) == trained_on(whole)[2:]
    assert_same_end(resumed, whole)


def test_the_last_complete_checkpoint_stays_until_the_next_is_complete(recipes, material, tmp_path):
    options = material.cpt_options(
        max_steps=NUM_STEPS, save_strategy="steps", save_steps=SAVE_STEPS, save_total_limit=1
    )
    recipes.run("cpt", tmp_path / "killed", kill_in_save=4, **options)
    assert (tmp_path / "killed" / "checkpoint-2" / "verified_save.json").is_file()
    recipes.run("cpt", tmp_path / "killed", resume_from_checkpoint=True, **options).check()
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize("init_weights", ["normal", "reparameterized"])
def test_a_checkpoint_of_weights_goes_on_with_a_new_optimizer_where_that_is_asked_for(
    recipes, material, tmp_path, init_weights
):
    options = material.cpt_options(
        save_strategy="steps", save_steps=2, save_only_model=True, init_weights=init_weights
    )
    recipes.run("cpt", tmp_path, kill_at_batch=3, **options)
    refused = recipes.run("cpt", tmp_path, resume_from_checkpoint=True, **options)
    assert "can't be resumed as it was: it has no optimizer.pt" in refused.errors()[0]
    assert refused.batches() == []
    resumed = recipes.run("cpt", tmp_path, resume_from_checkpoint=True, restart_optimizer=True, **options).check()
    assert [batch["step"] for batch in resumed.batches()] == [2, 3]
    assert "the random numbers start anew" in (resumed.record / "stdout.0").read_text().replace("\n", " ")


@pytest.mark.parametrize("init_weights", ["normal", "reparameterized"])
def test_the_best_checkpoint_is_what_is_saved_in_the_end(recipes, material, init_weights):
    measured = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "greater_is_better": True}  # so that it is not the last one
    run = recipes.run("cpt", **material.cpt_options(init_weights=init_weights, **measured, **best)).check()
    expected = load_file(run.output_dir / "checkpoint-2" / "adapter_model.safetensors")
    assert run.tensors.keys() == expected.keys()
    assert all(torch.equal(run.tensors[name], tensor) for name, tensor in expected.items())
    losses = [entry["eval_loss"] for entry in run.metrics["log_history"] if "eval_loss" in entry]
    assert losses[0] > losses[1]
    assert run.metrics["heldout_loss"] == pytest.approx(losses[0], abs=1e-3)
