"""Runs that are killed at random moments and resumed, and what must hold of their end."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from support.recipe_runs import Material, RecipeServer, Result, describe_run, launch_all


STEPS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
ENGINES = ("ddp", "zero3", "fsdp2")
SECONDS_PER_RUN = 60


@dataclass(frozen=True)
class Setup:
    """One way to read and train: a recipe and its options.

    Args:
        recipe: name of the script.
        options: from the material to the recipe's options; `datasets` goes into a file.
    """

    recipe: str
    options: Callable[[Material], dict[str, Any]]


def _mixture(material: Material) -> list[dict[str, Any]]:
    sources = ((material.text, 3), (material.other_text, 1))
    return [{"path": path, "weight": weight, "streaming": True} for path, weight in sources]


SETUPS = {
    "packed": Setup("cpt", lambda material: material.cpt_options(train_backbone=True)),
    "packed, streaming": Setup(
        "cpt",
        lambda material: material.cpt_options(dataset_name=None, datasets=_mixture(material), shuffle_buffer_size=8),
    ),
    "not packed": Setup("sft", lambda material: material.sft_options()),
}


@dataclass(frozen=True)
class Kill:
    """One kill and what became of the run.

    Args:
        seconds: after the run's start.
        was_killed: False where the run had ended before.
        problem: what differs from the run that nothing happened to, None where nothing does.
    """

    seconds: float
    was_killed: bool
    problem: str | None


def kill_and_resume(
    execute: Callable[[Sequence[tuple[str, dict[str, Any]]]], list[Result]], num_kills: int
) -> list[Kill]:
    """Train once without, and `num_kills` times with a kill at a random moment; each of these is resumed to its end.

    Args:
        execute: as from [`in_one_process`] or [`on_two_processes`].
        num_kills: how often.
    """
    (whole,) = execute([("whole", {})])
    whole.check()
    duration = float((whole.record / "duration").read_text())
    moments = [random.uniform(0, duration) for _ in range(num_kills)]
    plans = []
    for number, moment in enumerate(moments):
        plans += [(f"run-{number}", {"kill_after": moment}), (f"run-{number}", {"resume_if_possible": True})]
    results = execute(plans)
    return [
        Kill(moment, killed.exit_code != 0, _difference(resumed, whole))
        for moment, killed, resumed in zip(moments, results[::2], results[1::2])
    ]


def in_one_process(
    server: RecipeServer, setup: Setup, material: Material, folder: Path
) -> Callable[[Sequence[tuple[str, dict[str, Any]]]], list[Result]]:
    """A function that executes runs, given as names of output folders and what is done to them."""
    options = _options(setup, material, folder)

    def execute(plans: Sequence[tuple[str, dict[str, Any]]]) -> list[Result]:
        return [server.run(setup.recipe, folder / name / "output", **options, **fault) for name, fault in plans]

    return execute


def on_two_processes(
    engine: str, setup: Setup, material: Material, folder: Path
) -> Callable[[Sequence[tuple[str, dict[str, Any]]]], list[Result]]:
    """As [`in_one_process`], launched under an engine; all ranks are killed, and the results are those of the first."""
    options = _options(setup, material, folder)
    options |= {"per_device_train_batch_size": 2, "fsdp_on_cpu": engine == "fsdp2"}

    def execute(plans: Sequence[tuple[str, dict[str, Any]]]) -> list[Result]:
        runs = {
            f"{number} {name}": describe_run(
                setup.recipe, folder / name / f"part-{number}", folder / name / "output", {**options, **fault}
            )
            for number, (name, fault) in enumerate(plans)
        }
        launched = launch_all(engine, folder / f"launch-{len(plans)}", runs, SECONDS_PER_RUN * (len(plans) + 2))
        return [ranks[0] for ranks in launched.values()]

    return execute


def _options(setup: Setup, material: Material, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    options = {**setup.options(material), **STEPS}
    datasets = options.pop("datasets", None)
    if datasets is not None:  # a list of sources can only come from a file
        options["config"] = folder / "datasets.yaml"
        options["config"].write_text(yaml.safe_dump({"datasets": datasets}))
    return options


def _difference(resumed: Result, whole: Result) -> str | None:
    if resumed.exit_code != 0:
        return f"resuming ended with {resumed.exit_code}: {resumed.stderr().strip().splitlines()[-1]}"
    found, expected = (load_file(result.output_dir / "adapter_model.safetensors") for result in (resumed, whole))
    if found.keys() != expected.keys():
        return f"tensors {sorted(found.keys() ^ expected.keys())} are missing or unexpected"
    changed = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    return f"tensors differ, first {changed[0]}" if changed else None
