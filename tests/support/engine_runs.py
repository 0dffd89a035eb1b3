"""Runs under an engine on two processes, and what must hold of them."""

import pytest
import torch

from support.recipe_runs import describe_run, launch_all, reloaded_logits


TWO_PROCESSES = {"per_device_train_batch_size": 2}


def runs_of(config, folder, runs):
    """Launch runs, each given as a recipe and its options; `folder/<name>` is its output folder."""
    described = {
        name: describe_run(recipe, folder / "work" / name, folder / name, options)
        for name, (recipe, options) in runs.items()
    }
    return launch_all(config, folder / "launch", described)


def assert_agree(result, reference):
    """Losses of the run, of the held-out text, and the fingerprint of the backbone."""
    assert result.losses == pytest.approx(reference.losses, abs=1e-5)
    assert result.metrics["heldout_loss"] == pytest.approx(reference.metrics["heldout_loss"], abs=1e-5)
    assert result.metrics["num_tokens"] == reference.metrics["num_tokens"]
    assert result.adapter_config["backbone_fingerprint"] == reference.adapter_config["backbone_fingerprint"]


def assert_saved(result):
    """The adapter reloads, without any engine, to what the model said in its engine."""
    torch.testing.assert_close(reloaded_logits(result.output_dir), result.logits(), rtol=0, atol=1e-5)
