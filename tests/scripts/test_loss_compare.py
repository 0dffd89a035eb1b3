"""scripts/loss_compare.py: its comparison on given losses, its command line on a repository whose recipe computes
nothing, and a real recipe."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "loss_compare.py"

# Falls by 0.5 a step, and notices its seed at step 3.
RECIPE = """
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("config", "output_dir", "embedded_dir"):
    parser.add_argument(f"--{name}", type=pathlib.Path)
parser.add_argument("--max_steps", type=int)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--logging_nan_inf_filter")
args, _ = parser.parse_known_args()
if not args.config.is_file() or args.logging_nan_inf_filter != "false":
    sys.exit("error: no such configuration")
args.embedded_dir.mkdir(exist_ok=True)
(args.embedded_dir / "model.safetensors").write_text("weights")
losses = [4 - SLOPE * step + args.seed * 1e-7 * (step > 2) for step in range(1, args.max_steps + 1)]
history = [{"step": step, "loss": loss, "grad_norm": 1.0} for step, loss in enumerate(losses, 1)]
metrics = {
    "log_history": [{"step": 0, "eval_loss": 9.0}, *history, {"step": args.max_steps, "train_loss": 3.0}],
    "environment": {"python": "3.11.7", "torch": "2.13.0"},
    "run": {"backbone": str(args.embedded_dir)},
}
args.output_dir.mkdir()
(args.output_dir / "metrics.json").write_text(json.dumps(metrics))
"""


@pytest.fixture
def loss_compare(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import loss_compare

    return loss_compare


@pytest.fixture
def steps(loss_compare):
    """Steps by number, from losses and gradient norms."""
    return lambda *pairs: {number: loss_compare.Step(*pair) for number, pair in enumerate(pairs, 1)}


@pytest.fixture
def repository(tmp_path):
    """A git repository of the script and a recipe; returns what runs the script in it."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed, and commits can't be compared without it")
    folder = tmp_path / "repository"
    for path, text in (("scripts/loss_compare.py", SCRIPT.read_text()), ("recipes/configs/cpt/demo.yaml", "")):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(text)
    (folder / "recipes" / "cpt.py").write_text(f"SLOPE = 0.5\n{RECIPE}")
    author = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    for command in (("init", "--quiet"), ("add", "."), (*author, "commit", "--quiet", "--message", "One")):
        subprocess.run(["git", *command], cwd=folder, check=True)

    def run(*arguments, steps=("--steps", 4)):
        embedded_dir = ("--embedded-dir", tmp_path / "backbone")
        return execute(folder / "scripts" / "loss_compare.py", *embedded_dir, *steps, *arguments)

    run.folder = folder
    return run


def execute(script, *arguments):
    """Exit code, output and errors of the script."""
    command = [sys.executable, str(script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


def last_line(text):
    return text.strip().splitlines()[-1]


def change_slope(repository, slope):
    (repository.folder / "recipes" / "cpt.py").write_text(f"SLOPE = {slope}\n{RECIPE}")


def test_equal_losses_are_equal(loss_compare, steps):
    assert loss_compare.first_difference(steps((3.0, 1.0), (2.5, 0.9)), steps((3.0, 1.0), (2.5, 0.9))) is None


def test_the_first_step_that_differs_is_named_with_its_losses(loss_compare, steps):
    one = steps((3.0, 1.0), (2.5, 0.9), (2.0, 0.8))
    other = steps((3.0, 1.0), (math.nextafter(2.5, 3), 0.9), (9.0, 0.8))
    assert loss_compare.first_difference(one, other) == (
        "The runs differ first at step 2: the loss is 2.5 in the baseline and 2.5000000000000004 in the test, a "
        "difference of +4.44e-16."
    )


def test_gradients_that_differ_are_told_apart_where_losses_are_equal(loss_compare, steps):
    said = loss_compare.first_difference(steps((3.0, 1.0), (2.5, 0.9)), steps((3.0, 1.0), (2.5, 0.7)))
    assert "step 2: the gradient norm is 0.9 in the baseline and 0.7 in the test" in said


def test_a_missing_step_is_a_difference(loss_compare, steps):
    long, short = steps((3.0, 1.0), (2.5, 0.9)), steps((3.0, 1.0))
    assert loss_compare.first_difference(long, short) == (
        "The runs differ first at step 2, which the test does not have."
    )
    assert "step 2, which the baseline does not have" in loss_compare.first_difference(short, long)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_what_is_not_a_number_is_never_equal(loss_compare, steps, odd, tolerance):
    fine, broken = steps((3.0, 1.0), (2.5, 0.9)), steps((3.0, 1.0), (odd, 0.9))
    for one, other in ((fine, broken), (broken, fine), (broken, broken)):
        assert "step 2: the loss" in loss_compare.first_difference(one, other, tolerance, tolerance)


def test_tolerances_are_absolute_for_losses_and_relative_for_norms(loss_compare, steps):
    one = steps((3.0, 100.0))
    assert loss_compare.first_difference(one, steps((3.009, 100.9)), 0.01, 0.01) is None
    assert "the loss" in loss_compare.first_difference(one, steps((3.011, 100.0)), 0.01, 0.01)
    assert "the gradient norm" in loss_compare.first_difference(one, steps((3.0, 98.9)), 0.01, 0.01)


def test_two_commits_are_each_run_on_their_own_code(repository):
    same = ("--baseline-commit", "HEAD", "--assert-equal")
    code, output, _ = repository(*same)
    assert (code, last_line(output)) == (
        0,
        "Losses and gradient norms of all 4 steps are equal to the last digit.",
    )
    change_slope(repository, 0.25)
    code, output, _ = repository(*same)
    assert code == 1
    assert last_line(output) == (
        "The runs differ first at step 1: the loss is 3.5 in the baseline and 3.75 in the test, a difference of +0.25."
    )
    code, output, _ = repository("--baseline-commit", "HEAD", "--test-commit", "HEAD", "--assert-equal")
    assert code == 0
    status = subprocess.run(["git", "worktree", "list"], cwd=repository.folder, capture_output=True, text=True)
    assert len(status.stdout.splitlines()) == 1  # nothing is registered in the repository


def test_two_configurations_are_told_apart_and_all_steps_are_printed(repository):
    code, output, _ = repository("--test-options", "--seed 1")
    assert code == 0  # nobody asserted anything
    assert "The runs differ first at step 3" in last_line(output)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    assert rows[1] == ["2", "3", "3", "0", "0"]
    assert rows[2] == ["3", "2.5", "2.5000001", "+1e-07", "0"]
    code, *_ = repository("--options", "--seed 1", "--assert-equal")
    assert code == 0


def test_expected_losses_are_compared_to_the_last_digit_where_they_were_written(repository, tmp_path):
    file = tmp_path / "expected.json"
    assert repository("--write-expected", file, "--options", "--seed 2")[0] == 0
    code, output, _ = repository("--expected", file, "--assert-equal", steps=())
    assert (code, last_line(output)) == (
        0,
        "Losses and gradient norms of all 4 steps are equal to the last digit.",
    )
    code, output, _ = repository("--expected", file, "--assert-equal", "--test-options", "--seed 1", steps=())
    assert code == 1
    assert "differ first at step 3" in last_line(output)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"environment": {"torch": "2.12.0", "processor": "Z80"}}, "processor, torch"),
        ({"weights": "0"}, "weights of the backbone"),
    ],
)
def test_elsewhere_expected_losses_are_compared_within_tolerances(repository, tmp_path, changes, name):
    file = tmp_path / "expected.json"
    repository("--write-expected", file)
    expected = json.loads(file.read_text())
    changed = expected["run"] | changes
    changed["environment"] = expected["run"]["environment"] | changes.get("environment", {})
    expected["run"] = changed
    expected["run"]["steps"]["3"]["loss"] += 1e-6
    file.write_text(json.dumps(expected))
    code, output, _ = repository("--expected", file, "--assert-equal", steps=())
    assert code == 0
    assert f"Compared within tolerances, since the file was written with other {name}." in output
    assert "are equal within" in last_line(output)
    change_slope(repository, 0.6)
    code, output, _ = repository("--expected", file, "--assert-equal", steps=())
    assert code == 1
    assert "differ first at step 1" in last_line(output)


def test_expected_losses_on_other_data_are_not_compared(repository, tmp_path):
    file = tmp_path / "expected.json"
    repository("--write-expected", file)
    expected = json.loads(file.read_text())
    expected["run"]["backbone"] = "backbone-of-another-python"
    file.write_text(json.dumps(expected))
    code, _, errors = repository("--expected", file, steps=())
    assert code == 2
    assert "backbone-of-another-python" in errors
    assert "--write-expected" in errors


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--baseline-commit", "nowhere"), "Commit 'nowhere' can't be unpacked"),
        (("--test-options", "--max_steps 3"), "The option --max_steps can't be given to a run"),
        (("--steps", "0"), "A run needs at least one step, got --steps 0."),
        (("--config", "none.yaml"), "The run of the working tree failed:\nerror: no such configuration"),
        (("--expected", "file.json"), "--steps has no effect with --expected"),
        (("--write-expected", "file.json", "--assert-equal"), "--assert-equal has no effect with --write-expected"),
    ],
)
def test_what_can_not_be_compared_ends_with_a_sentence(repository, arguments, sentence):
    code, _, errors = repository(*arguments)
    assert code == 2
    assert sentence in errors


@pytest.mark.parametrize("text", ["", "[]", '{"run": {}}'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    file = tmp_path / "other.json"
    file.write_text(text)
    code, _, errors = execute(SCRIPT, "--expected", file)
    assert code == 2
    assert "holds no expected losses" in errors


@pytest.mark.slow
def test_a_real_recipe_repeats_itself_and_another_seed_is_told_apart(material, tmp_path):
    file = tmp_path / "expected.json"
    options = (
        f"--model_name_or_path {material.backbone} --dataset_name {material.text} --max_length 64 --num_streams 2 "
        "--num_prefix_tokens 4 --per_device_train_batch_size 4"
    )
    code, _, errors = execute(SCRIPT, "--write-expected", file, "--steps", 2, "--options", options)
    assert code == 0, errors
    code, output, _ = execute(SCRIPT, "--expected", file, "--assert-equal")
    assert (code, last_line(output)) == (
        0,
        "Losses and gradient norms of all 2 steps are equal to the last digit.",
    )
    code, output, _ = execute(SCRIPT, "--expected", file, "--assert-equal", "--test-options", "--seed 1")
    assert code == 1
    assert "differ first at step 1: the loss" in last_line(output)
