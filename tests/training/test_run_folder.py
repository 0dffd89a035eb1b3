"""An output folder belongs to one run."""

import json

import pytest

from parscale_adapt.training.run_folder import RunFolder


IDENTITY = {
    "seed": 0,
    "streams": {"num_streams": 2},
    "data": ["a"],
    "adapter": None,
    "lr_scheduler_kwargs": None,
    "model_init_kwargs": {"dtype": "float32"},
}


def checkpoint(folder, step, is_complete=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if is_complete:
        (path / "verified_save.json").write_text("{}")
    return path


@pytest.fixture
def folder(tmp_path):
    """A run with two complete checkpoints and a half-written one."""
    run = tmp_path / "run"
    assert RunFolder(run, IDENTITY).open(None) is None
    for step, is_complete in [(9, True), (10, True), (11, False)]:
        checkpoint(run, step, is_complete)
    return run


@pytest.mark.parametrize("resume", [None, "", "false", "False", False])
def test_a_new_folder_is_claimed(tmp_path, resume):
    run = tmp_path / "deep" / "run"
    assert RunFolder(run, IDENTITY).open(resume) is None
    assert json.loads((run / "run.json").read_text()) == IDENTITY


@pytest.mark.parametrize("resume", ["true", "True", True])
def test_resuming_takes_the_last_complete_checkpoint(folder, resume):
    assert RunFolder(folder, IDENTITY).open(resume) == str(folder / "checkpoint-10")


def test_a_named_checkpoint_must_be_complete(folder):
    named = str(folder / "checkpoint-9")
    assert RunFolder(folder, IDENTITY).open(named) == named
    with pytest.raises(ValueError, match="is no complete checkpoint"):
        RunFolder(folder, IDENTITY).open(str(folder / "checkpoint-11"))


def test_nothing_to_resume_from_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no complete checkpoint to resume from"):
        RunFolder(tmp_path / "run", IDENTITY).open("true")
    assert not (tmp_path / "run").exists()


def test_the_same_run_is_not_overwritten(folder):
    with pytest.raises(ValueError, match=r"already holds this run \(checkpoint-10\)"):
        RunFolder(folder, IDENTITY).open(None)


@pytest.mark.parametrize("name", ["metrics.json", "verified_save.json"])
def test_a_trained_model_is_not_overwritten_measured_or_not(tmp_path, name):
    RunFolder(tmp_path, IDENTITY).open(None)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"already holds this run \({name}\)"):
        RunFolder(tmp_path, IDENTITY).open(None)
    with pytest.raises(ValueError, match="holds a different run: `seed`"):
        RunFolder(tmp_path, {**IDENTITY, "seed": 1}).open(None)


@pytest.mark.parametrize("resume", [None, "true"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "`seed` is 0 there and 1 here"),
        ({"streams": {"num_streams": 4}}, "`streams.num_streams` is 2 there and 4 here"),
        ({"data": ["a", "b"]}, r"`data` is \['a'\] there and \['a', 'b'\] here"),
        ({"adapter": "x"}, "`adapter` is None there and 'x' here"),
        ({"lr_scheduler_kwargs": {"min_lr": 1e-5}}, "`lr_scheduler_kwargs` is None there and {'min_lr': 1e-05} here"),
        ({"model_init_kwargs": {}}, "`model_init_kwargs` is {'dtype': 'float32'} there and {} here"),
    ],
)
def test_another_run_is_refused(folder, changes, message, resume):
    with pytest.raises(ValueError, match=message):
        RunFolder(folder, {**IDENTITY, **changes}).open(resume)
    assert json.loads((folder / "run.json").read_text()) == IDENTITY


def test_a_run_of_another_version_is_compared_in_what_both_know(folder, capsys):
    newer = {**IDENTITY, "streams": {"num_streams": 2, "aggregator": "dynamic"}, "warmup_steps": 10}
    with pytest.raises(ValueError, match="`seed` is 0 there and 1 here"):
        RunFolder(folder, {**newer, "seed": 1}).open("true")
    assert RunFolder(folder, newer).open("true") == str(folder / "checkpoint-10")
    (line,) = capsys.readouterr().err.splitlines()
    assert "was started by another version" in line
    assert "can't be compared: streams.aggregator, warmup_steps. Make sure" in line
    with pytest.raises(ValueError, match="`warmup_steps` is 10 there and 20 here"):
        RunFolder(folder, {**newer, "warmup_steps": 20}).open("true")


def test_a_run_that_trained_nothing_gives_way(tmp_path):
    RunFolder(tmp_path, IDENTITY).open(None)
    other = {**IDENTITY, "seed": 1}
    assert RunFolder(tmp_path, other).open(None) is None
    assert json.loads((tmp_path / "run.json").read_text()) == other


@pytest.mark.parametrize("is_file", [True, False])
def test_what_is_no_run_is_left_alone(tmp_path, is_file):
    path = tmp_path / "thesis"
    (path if is_file else tmp_path / "other").write_text("irreplaceable")
    with pytest.raises(ValueError, match="is not empty and holds no run of a recipe"):
        RunFolder(path if is_file else tmp_path, IDENTITY).open(None)
