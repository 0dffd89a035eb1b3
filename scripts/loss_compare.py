"""Whether two runs of a recipe have the same losses: two commits, two configurations, or a run and what was expected.

    python scripts/loss_compare.py --baseline-commit HEAD --assert-equal          # a commit and the working tree
    python scripts/loss_compare.py --baseline-commit HEAD~1 --test-commit HEAD --recipe sft --steps 5
    python scripts/loss_compare.py --test-options "--num_streams 2"               # one commit, two configurations
    python scripts/loss_compare.py --expected scripts/expected_losses/cpt_demo.json --assert-equal
    python scripts/loss_compare.py --write-expected scripts/expected_losses/cpt_demo.json

A run is `recipes/<recipe>.py` on one of its configurations, both of the commit, whose files are unpacked into a
temporary folder ("." is the working tree). Options are the recipe's own and win over the configuration; relative paths
in them start at the commit's root. Runs are on the CPU, in one thread, with torch's deterministic algorithms, on the
installed versions of all packages. All start from the same embedded backbone, which the first run pretrains (about 3
minutes) and `--embedded-dir` keeps, runs/loss_compare unless given.

Compared are the training loss and the gradient norm of every step, in full precision as `metrics.json` holds them. The
norm tells gradients apart one step before the loss does, and says something about the last step. What is not a number
is never equal. With `--assert-equal` the exit code is 1 where runs differ; a comparison that can't be made ends with 2.

Expected losses are compared to the last digit where Python, packages, processor and the backbone's weights are those
of the file, and elsewhere within tolerances; the output says which. They are refused on another corpus, as is that of
another Python, whose standard library it is. A change that is meant to move them writes the files anew.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table


ROOT = Path(__file__).resolve().parents[1]
WORKING_TREE = "."
# Without vector instructions (ATEN_CPU_CAPABILITY=default, ONEDNN_MAX_CPU_ISA=SSE41), in pretraining too, losses of the
# demos move by at most 1.4e-4 nats per token, norms by at most 0.07%. Two streams instead of four move losses by 2.4e-3
# or more.
LOSS_TOLERANCE = 1e-3
NORM_TOLERANCE = 5e-3
# What makes runs comparable, and short.
FIXED_OPTIONS = {
    "use_cpu": "true",
    "full_determinism": "true",
    "logging_steps": "1",
    "logging_nan_inf_filter": "false",  # transformers would log the mean of earlier losses instead
    "eval_strategy": "no",
    "eval_on_start": "false",
    "max_heldout_rows": "16",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": "true",
}
SET_BY_SCRIPT = {"config", "output_dir", "embedded_dir", "max_steps", *FIXED_OPTIONS}
WITHOUT_EFFECT = {
    "expected": ("recipe", "config", "steps", "options", "baseline_commit", "baseline_options"),
    "write_expected": ("baseline_commit", "baseline_options", "test_options", "assert_equal"),
}
VECTOR_FLAGS = ("avx", "amx", "fma", "asimd", "sve")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}


@dataclass(frozen=True)
class Settings:
    """What a run does: `recipes/<recipe>.py` on `recipes/configs/<recipe>/<config>`, with options of the recipe."""

    recipe: str
    config: str
    num_steps: int
    options: Sequence[str] = ()


@dataclass(frozen=True)
class Step:
    """What is compared of one training step: its loss in nats per token, and its gradient norm before clipping."""

    loss: float
    gradient_norm: float


@dataclass(frozen=True)
class Run:
    """What a run came to: its steps by number, from 1, and all that they depend on besides code and settings.

    Args:
        steps: losses and gradient norms.
        environment: versions and processor.
        backbone: name of the backbone, which for the embedded one follows its settings and training data.
        weights: sha256 of the backbone's weights; None where they are no single local file.
    """

    steps: Mapping[int, Step]
    environment: Mapping[str, str]
    backbone: str
    weights: str | None


def first_difference(
    baseline: Mapping[int, Step], test: Mapping[int, Step], loss_tolerance: float = 0.0, norm_tolerance: float = 0.0
) -> str | None:
    """The first step at which two runs differ, and by how much.

    Args:
        baseline: steps by number.
        test: steps by number.
        loss_tolerance: largest difference of losses, in nats per token.
        norm_tolerance: largest difference of gradient norms, as a share of the baseline's.

    Returns:
        A sentence, or None where nothing differs.
    """
    for number in sorted(baseline.keys() | test.keys()):
        for name, steps in (("baseline", baseline), ("test", test)):
            if number not in steps:
                return f"The runs differ first at step {number}, which the {name} does not have."
        one, other = baseline[number], test[number]
        pairs = (
            ("loss", one.loss, other.loss, loss_tolerance),
            ("gradient norm", one.gradient_norm, other.gradient_norm, norm_tolerance * abs(one.gradient_norm)),
        )
        for name, expected, found, tolerance in pairs:
            if not abs(found - expected) <= tolerance:  # so that NaN differs from everything
                return (
                    f"The runs differ first at step {number}: the {name} is {expected!r} in the baseline and {found!r} "
                    f"in the test, a difference of {found - expected:+.3g}."
                )
    return None


def environment_difference(expected: Run, found: Run) -> list[str]:
    """In what a run's machine differs from that of the expected losses.

    Raises:
        ValueError: the runs start from different backbones, or train on other data.
    """
    if expected.backbone != found.backbone:
        pythons = [run.environment["python"] for run in (expected, found)]
        raise ValueError(
            f"The expected losses are those of {expected.backbone} on Python {pythons[0]}, and this run started from "
            f"{found.backbone} on Python {pythons[1]}. Write a file for these training data with --write-expected."
        )
    names = sorted(expected.environment.keys() | found.environment.keys())
    differing = [name for name in names if expected.environment.get(name) != found.environment.get(name)]
    return differing + ["weights of the backbone"] * (expected.weights != found.weights)


def read_run(folder: Path) -> Run:
    """What a run left in its output folder.

    Raises:
        ValueError: it logged no losses, or no gradient norms.
    """
    metrics = json.loads((folder / "metrics.json").read_text())
    entries = [entry for entry in metrics["log_history"] if "loss" in entry]
    if not entries or any("grad_norm" not in entry for entry in entries):
        raise ValueError("A run logged no losses or no gradient norms: take at least one step, and clip gradients.")
    backbone = Path(metrics["run"]["backbone"])
    weights = backbone / "model.safetensors"
    return Run(
        steps={entry["step"]: Step(entry["loss"], entry["grad_norm"]) for entry in entries},
        environment={**metrics["environment"], "processor": processor()},
        backbone=backbone.name,
        weights=hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None,
    )


def processor() -> str:
    """What decides which kernels torch takes: the processor's model and its vector instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor()
    lines = (line.partition(":") for line in cpuinfo.read_text().split("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    model = [fields[name] for name in ("model name", "cpu family", "model") if name in fields]
    flags = fields.get("flags", fields.get("Features", "")).split()
    return " ".join([*model, *sorted(flag for flag in flags if flag.startswith(VECTOR_FLAGS))])


def checkout(commit: str, folder: Path) -> Path:
    """The files of a commit, below a folder; the working tree itself for ".".

    Raises:
        ValueError: git knows no such commit.
    """
    if commit == WORKING_TREE:
        return ROOT
    archive, files = folder / "commit.tar", folder / "commit"
    # An archive leaves nothing behind in the repository, however this script ends; a worktree would be registered.
    command = ["git", "archive", "--format=tar", f"--output={archive}", commit]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"Commit {commit!r} can't be unpacked: {' '.join(result.stderr.split())}")
    with tarfile.open(archive) as tar:
        tar.extractall(files, filter="data")
    return files


def train(commit: str, settings: Settings, embedded_dir: Path) -> Run:
    """Run a recipe of a commit.

    Raises:
        ValueError: no step, an option that this script sets itself, no such commit, or the run failed.
    """
    if settings.num_steps < 1:
        raise ValueError(f"A run needs at least one step, got --steps {settings.num_steps}.")
    given = {option.lstrip("-").split("=")[0] for option in settings.options if option.startswith("--")}
    if taken := sorted(given & SET_BY_SCRIPT):
        raise ValueError(f"The option --{taken[0]} can't be given to a run: loss_compare.py sets it.")
    with tempfile.TemporaryDirectory() as scratch:
        root, output = checkout(commit, Path(scratch)), Path(scratch) / "run"
        options = {"output_dir": output, "embedded_dir": embedded_dir.resolve(), "max_steps": settings.num_steps}
        command = [
            *(sys.executable, str(root / "recipes" / f"{settings.recipe}.py")),
            *("--config", str(root / "recipes" / "configs" / settings.recipe / settings.config)),
            *(part for name, value in {**options, **FIXED_OPTIONS}.items() for part in (f"--{name}", str(value))),
            *settings.options,
        ]
        code = "the working tree" if commit == WORKING_TREE else f"commit {commit}"
        print(f"Running {settings.recipe} {settings.config} of {code} ...", file=sys.stderr, flush=True)
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(root)}
        result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise ValueError(f"The run of {code} failed:\n{result.stderr[-3000:].strip()}")
        return read_run(output)


def read_expected(path: Path) -> tuple[Settings, Run]:
    """A file of expected losses: the run's settings, and what it came to; a ValueError where it is no such file."""
    try:
        content = json.loads(path.read_text())
        content["run"]["steps"] = {int(number): Step(**step) for number, step in content["run"]["steps"].items()}
        return Settings(**content["settings"]), Run(**content["run"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no expected losses ({error!r}): write it with --write-expected.") from error


def write_expected(path: Path, settings: Settings, run: Run) -> None:
    """Keep a run as what is expected of later ones; a ValueError where one of its numbers is not finite."""
    text = json.dumps({"settings": asdict(settings), "run": asdict(run)}, indent=2, allow_nan=False)
    path.write_text(text + "\n")


def table(baseline: Mapping[int, Step], test: Mapping[int, Step]) -> Table:
    """Losses of the steps that both runs have, with nine digits, which tell any two float32 numbers apart."""
    columns = ("step", "baseline loss", "test loss", "difference", "of gradient norms")
    result = Table(*(Column(name, justify="right") for name in columns))
    for number in sorted(baseline.keys() & test.keys()):
        one, other = baseline[number], test[number]
        differences = (other.loss - one.loss, other.gradient_norm - one.gradient_norm)
        shown = (f"{difference:+.3g}" if difference else "0" for difference in differences)
        result.add_row(str(number), f"{one.loss:.9g}", f"{other.loss:.9g}", *shown)
    return result


def compare_runs(args: argparse.Namespace) -> bool:
    """Train twice, print both, and say whether they are equal."""
    runs = []
    for commit, options in ((args.baseline_commit, args.baseline_options), (args.test_commit, args.test_options)):
        settings = Settings(args.recipe, args.config, args.steps, shlex.split(f"{args.options} {options}"))
        runs.append(train(commit, settings, args.embedded_dir))
    baseline, test = runs
    Console().print(table(baseline.steps, test.steps))
    if (baseline.backbone, baseline.weights) != (test.backbone, test.weights):
        print(f"The runs started from different backbones, {baseline.backbone} and {test.backbone}.")
    return report(baseline.steps, test.steps)


def compare_with_expected(args: argparse.Namespace) -> bool:
    """Train once, print it beside what was expected, and say whether it is that."""
    settings, expected = read_expected(args.expected)
    settings = replace(settings, options=[*settings.options, *shlex.split(args.test_options)])
    found = train(args.test_commit, settings, args.embedded_dir)
    Console().print(table(expected.steps, found.steps))
    differing = environment_difference(expected, found)
    if differing:
        print(f"Compared within tolerances, since the file was written with other {', '.join(differing)}.")
        return report(expected.steps, found.steps, LOSS_TOLERANCE, NORM_TOLERANCE)
    return report(expected.steps, found.steps)


def report(
    baseline: Mapping[int, Step], test: Mapping[int, Step], loss_tolerance: float = 0.0, norm_tolerance: float = 0.0
) -> bool:
    """Say in one sentence whether two runs are equal, and return it."""
    difference = first_difference(baseline, test, loss_tolerance, norm_tolerance)
    extent = f"within {loss_tolerance:g} and {norm_tolerance:.1%}" if loss_tolerance else "to the last digit"
    print(difference or f"Losses and gradient norms of all {len(baseline)} steps are equal {extent}.")
    return difference is None


def parse_arguments() -> argparse.Namespace:
    """The command line, in which nothing is without effect."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", choices=("cpt", "sft"), default="cpt")
    parser.add_argument("--config", default="demo.yaml", help="A file in recipes/configs/<recipe>/; demo.yaml.")
    parser.add_argument("--steps", type=int, default=10, help="How many steps to train; 10.")
    parser.add_argument("--options", default="", help='Recipe options of every run, such as "--num_streams 2".')
    for run in ("baseline", "test"):
        parser.add_argument(f"--{run}-commit", default=WORKING_TREE, help='A commit; ".", the working tree.')
        parser.add_argument(f"--{run}-options", default="", help="Recipe options of this run alone.")
    parser.add_argument("--embedded-dir", type=Path, default=ROOT / "runs" / "loss_compare")
    parser.add_argument("--assert-equal", action="store_true", help="End with exit code 1 where the runs differ.")
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--expected", type=Path, help="Compare with this file, which names recipe, steps and options.")
    files.add_argument("--write-expected", type=Path, help="Run the test commit alone, and write this file.")
    args = parser.parse_args()
    for mode, without_effect in WITHOUT_EFFECT.items():
        given = [name for name in without_effect if getattr(args, name) != parser.get_default(name)]
        if getattr(args, mode) and given:
            parser.error(f"--{given[0]} has no effect with --{mode}: leave it out.".replace("_", "-"))
    return args


def main() -> None:
    args = parse_arguments()
    equal = True
    try:
        if args.write_expected:
            settings = Settings(args.recipe, args.config, args.steps, shlex.split(args.options))
            write_expected(args.write_expected, settings, train(args.test_commit, settings, args.embedded_dir))
        else:
            equal = compare_with_expected(args) if args.expected else compare_runs(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(int(args.assert_equal and not equal))


if __name__ == "__main__":
    main()
