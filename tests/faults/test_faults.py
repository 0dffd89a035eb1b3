"""Faults other than kill -9: nothing is lost, and one sentence says what is left and how it goes on."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.recipe_runs import describe_run, environment, launch_all

from parscale_adapt.training.run_folder import RunFolder, verified_checkpoints


STEPS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
IDENTITY = {"recipe": "cpt"}


@pytest.fixture(scope="session")
def whole(recipes, material):
    """A run to which nothing happens."""
    return recipes.run("cpt", **material.cpt_options(**STEPS)).check()


def assert_it_goes_on(recipes, stopped, whole, options):
    """The command in the last line names this run, and resuming ends as the run that nothing happened to."""
    (sentence,) = stopped.errors()
    words = shlex.split(sentence.partition("go on with: ")[2])
    assert words[1].endswith("cpt.py")
    assert words[words.index("--output_dir") + 1] == str(stopped.output_dir)
    assert words[-2:] == ["--resume_from_checkpoint", "true"]
    resumed = recipes.run("cpt", stopped.output_dir, resume_from_checkpoint=True, **options).check()
    assert_same_tensors(resumed, whole)


def assert_same_tensors(found, expected):
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


@pytest.mark.parametrize("file", ["adapter", "optimizer"])
def test_a_disk_that_is_full_while_a_checkpoint_is_written(recipes, material, whole, tmp_path, file):
    options = material.cpt_options(**STEPS)
    stopped = recipes.run("cpt", tmp_path / "run", fault=(f"disk full for the {file}", 4, ""), **options)
    assert stopped.exit_code == 1
    assert "Traceback" not in stopped.stderr()
    (sentence,) = stopped.errors()
    folder = stopped.output_dir
    assert f"stopped after step 4, since checkpoint-4 could not be written to {folder} (" in sentence
    assert "MiB are free there); " in sentence
    assert f"the last verified checkpoint is {folder / 'checkpoint-2'}; go on with: " in sentence
    assert_it_goes_on(recipes, stopped, whole, options)


def test_a_disk_that_is_full_when_the_model_is_saved(recipes, material, whole, tmp_path):
    options = material.cpt_options(**STEPS)
    stopped = recipes.run("cpt", tmp_path / "run", fault=("disk full for the model", 6, ""), **options)
    assert stopped.exit_code == 1
    assert "Traceback" not in stopped.stderr()
    folder = stopped.output_dir
    assert f"since the trained model could not be written to {folder} (" in stopped.errors()[0]
    assert f"the last verified checkpoint is {folder / 'checkpoint-6'}" in stopped.errors()[0]
    assert not (folder / "adapter_model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert_it_goes_on(recipes, stopped, whole, options)


def test_a_data_file_that_vanishes_while_it_is_streamed(recipes, material, tmp_path):
    text = json.loads(Path(material.text).read_text().splitlines()[0])["text"]
    rows = [json.dumps({"text": text[number : number + 200]}) + "\n" for number in range(400)]
    parts = [tmp_path / "part-0.jsonl", tmp_path / "part-1.jsonl"]
    for part, some in zip(parts, (rows[:300], rows[300:])):
        part.write_text("".join(some))
    # A row is a fifth of a document, so the second file comes after the 1,000 rows that are checked at the start.
    options = material.cpt_options(
        dataset_name=tmp_path / "part-*.jsonl",
        streaming=True,
        shuffle_buffer_size=0,
        max_length=16,
        per_device_train_batch_size=16,
        max_steps=95,
        save_strategy="steps",
        save_steps=40,
    )
    whole = recipes.run("cpt", tmp_path / "whole", **options).check()
    stopped = recipes.run("cpt", tmp_path / "run", fault=("a file vanishes", 3, str(parts[1])), **options)
    assert stopped.exit_code == 1
    assert "Traceback (most recent call last)" in stopped.stderr()
    last = verified_checkpoints(stopped.output_dir)[-1]
    assert "FileNotFoundError" in stopped.errors()[0]
    assert f"the last verified checkpoint is {last}; go on with: " in stopped.errors()[0]
    parts[1].write_text("".join(rows[300:]))
    assert_it_goes_on(recipes, stopped, whole, options)


def test_a_clock_that_jumps_back(recipes, material, whole, tmp_path):
    options = material.cpt_options(**STEPS, save_total_limit=1)
    backwards = {"fault": ("the clock jumps", 0, "")}
    stopped = recipes.run("cpt", tmp_path / "run", kill_at_batch=5, **backwards, **options)
    assert [path.name for path in verified_checkpoints(stopped.output_dir)] == ["checkpoint-4"]
    resumed = recipes.run("cpt", tmp_path / "run", resume_from_checkpoint=True, **backwards, **options).check()
    assert [batch["step"] for batch in resumed.batches()] == [4, 5]
    assert [path.name for path in verified_checkpoints(resumed.output_dir)] == ["checkpoint-6"]
    assert_same_tensors(resumed, whole)


@pytest.mark.parametrize("saving", [STEPS, {"max_steps": 6}, {**STEPS, "dataloader_num_workers": 1}])
def test_sigterm_saves_and_ends(recipes, material, whole, tmp_path, saving):
    options = material.cpt_options(**saving)
    stopped = recipes.run("cpt", tmp_path / "run", fault=("SIGTERM", 2, "0"), **options)
    assert stopped.exit_code == 128 + signal.SIGTERM
    assert "Traceback" not in stopped.stderr()
    checkpoint = stopped.output_dir / "checkpoint-3"
    assert "training stopped after step 3, asked to end by SIGTERM; " in stopped.errors()[0]
    assert f"the last verified checkpoint is {checkpoint}; go on with: " in stopped.errors()[0]
    assert not (stopped.output_dir / "adapter_model.safetensors").exists()
    resumed = recipes.run("cpt", stopped.output_dir, resume_from_checkpoint=True, **options).check()
    assert [batch["step"] for batch in resumed.batches()] == [3, 4, 5]
    assert resumed.losses == whole.losses
    assert resumed.metrics["num_tokens"] == whole.metrics["num_tokens"]
    assert_same_tensors(resumed, whole)


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes(material, tmp_path):
    options = material.cpt_options(**STEPS, per_device_train_batch_size=2)
    plans = {"whole": {}, "stopped": {"fault": ("SIGTERM", 2, "1")}, "resumed": {"resume_from_checkpoint": True}}
    runs = {
        name: describe_run("cpt", tmp_path / name, tmp_path / f"output-{name == 'whole'}", {**options, **plan})
        for name, plan in plans.items()
    }
    whole, stopped, resumed = launch_all("ddp", tmp_path / "launch", runs).values()
    assert [result.exit_code for result in stopped] == [128 + signal.SIGTERM] * 2
    assert "training stopped after step 3, asked to end by SIGTERM; " in stopped[0].errors()[0]
    assert stopped[0].errors(rank=1) == []
    assert [result.exit_code for result in resumed] == [0, 0]
    assert [batch["step"] for batch in resumed[0].batches()] == [3, 4, 5]
    assert_same_tensors(resumed[0], whole[0])


def test_two_runs_in_one_folder(tmp_path):
    code = (
        "import sys; from parscale_adapt.training.run_folder import RunFolder\n"
        f"RunFolder(sys.argv[1], {IDENTITY!r}).open(None); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as first:
        assert first.stdout.readline() == "open\n"
        sentence = rf"{tmp_path / 'run'} is in use by a run \(process {first.pid} on .*\): let it end, or choose"
        with pytest.raises(ValueError, match=sentence):
            RunFolder(str(tmp_path / "run"), IDENTITY).open(None)
        first.kill()
    assert RunFolder(str(tmp_path / "run"), IDENTITY).open(None) is None


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"`output_dir` is .*, which can't be written: Not a directory; choose another"
    ):
        RunFolder(str(tmp_path / "file" / "run"), IDENTITY).open(None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("there", [True, False])
def test_a_read_only_folder(tmp_path, there):
    folder = tmp_path / "run"
    (folder if there else tmp_path / "other").mkdir()
    (folder if there else tmp_path).chmod(0o555)
    try:
        with pytest.raises(ValueError, match=r"`output_dir` is .*, which can't be written: Permission denied; choose"):
            RunFolder(str(folder), IDENTITY).open(None)
    finally:
        (folder if there else tmp_path).chmod(0o755)
