"""What goes wrong after the first step: nothing that was trained is lost, and what is left of it is said."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support.recipe_runs import (
    REPOSITORY,
    SECONDS_PER_LAUNCH,
    command_line,
    environment,
    free_port,
    on_two_cpu_processes,
    reloaded_logits,
)


# A row of 16 tokens is a fifth of a document; the bad one is met after the 1,000 rows that are checked at the start.
STREAMING = {"streaming": True, "shuffle_buffer_size": 0, "max_length": 16, "max_steps": 90}
SAVING = {"save_strategy": "steps", "save_steps": 10}


@pytest.fixture
def spoiled(material, tmp_path):
    """A text file to be read while it is trained on, of which one row is no text; and the file that it should be."""
    text = json.loads(Path(material.text).read_text().splitlines()[0])["text"]
    good = [{"text": text[number : number + 200]} for number in range(400)]
    bad = [*good[:300], {"text": None}, *good[301:]]
    paths = [tmp_path / "bad.jsonl", tmp_path / "good.jsonl"]
    for path, rows in zip(paths, (bad, good)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def test_a_run_that_stops_says_where_and_how_it_goes_on(recipes, material, spoiled, tmp_path):
    options = material.cpt_options(dataset_name=spoiled[0], per_device_train_batch_size=16, **STREAMING, **SAVING)
    folder = tmp_path / "run"
    result = recipes.run("cpt", folder, **options)
    assert result.exit_code == 1
    last = result.stderr().splitlines()[-1]
    assert "Traceback (most recent call last):" in result.stderr()
    assert [last] == result.errors()
    checkpoint = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert f"the last verified checkpoint is {checkpoint}; go on with: " in last

    words = shlex.split(last.partition("go on with: ")[2])
    assert words[:2] == ["python", str(REPOSITORY / "recipes" / "cpt.py")]
    assert words[-2:] == ["--resume_from_checkpoint", "true"]
    again = recipes.run("cpt", folder, resume_from_checkpoint=True, **options)
    (sentence,) = again.errors()  # it read on from the checkpoint, to the same row
    assert sentence.partition("; go on with: ")[0] == last.partition("; go on with: ")[0]
    assert len(again.batches()) < len(result.batches())

    # A run's data are part of what it is: with other data its adapter goes on in a run of its own.
    spoiled[1].replace(spoiled[0])
    refused = recipes.run("cpt", folder, resume_from_checkpoint=True, **options)
    assert f"the content of {spoiled[0]} is another now" in refused.errors()[0]


def test_a_run_that_can_not_be_measured_is_saved(recipes, material):
    result = recipes.run("cpt", fail_to_measure=True, **material.cpt_options())
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr()
    (sentence,) = result.errors()
    assert f"the trained model lies in {result.output_dir}, saved and verified, but" in sentence
    assert torch.isfinite(reloaded_logits(result.output_dir)).all()
    again = recipes.run("cpt", result.output_dir, **material.cpt_options())
    assert "already holds this run (verified_save.json)" in again.errors()[0]


def launched(folder, options):
    """What `accelerate launch` of a recipe on two processes prints to stderr, and its exit code."""
    config = folder / "ddp.yaml"
    config.write_text(yaml.safe_dump(on_two_cpu_processes("ddp")))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launcher += ["--main_process_port", str(free_port()), str(REPOSITORY / "recipes" / "cpt.py")]
    result = subprocess.run(
        [*launcher, *command_line(options)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=SECONDS_PER_LAUNCH,
    )
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")], result, launcher


@pytest.mark.slow
def test_two_processes_say_once_what_is_wrong(material, spoiled, tmp_path):
    options = material.cpt_options(per_device_train_batch_size=8, output_dir=tmp_path / "run")
    streaming = {**STREAMING, **SAVING, "dataset_name": spoiled[0]}
    errors, result, launcher = launched(tmp_path, {**options, **streaming})
    assert result.returncode == 1
    assert len(errors) == 1, result.stderr
    assert f"go on with: {shlex.join(launcher)} --" in errors[0]
