"""Runs that are killed at random moments and resumed, and what must hold of their end."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from support.recipe_runs import Material, RecipeServer, Result, describe_run, launch_all


STEPS: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
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
        moment: seconds after the run's start, or the checkpoint that was half written.
        problem: what differs from the run that nothing happened to, None where nothing does.
    """

    moment: str
    problem: str | None


def kill_and_resume(
    execute: Callable[[Sequence[tuple[str, dict[str, Any]]]], list[Result]], num_kills: int
) -> list[Kill]:
    """Train once without, and `num_kills` times with a kill; each of these is resumed to its end.

    The first kill comes while a checkpoint is half written, the others at random moments; one that came after the end
    of its run is repeated.

    Args:
        execute: as from [`in_one_process`] or [`on_two_processes`].
        num_kills: how often.
    """
    (whole,) = execute([("whole", {})])
    whole.check()
    duration = float((whole.record / "duration").read_text())
    kills: list[Kill] = []
    num_runs = 0
    while len(kills) < num_kills:
        plans, moments = [], []
        for number in range(num_runs, num_runs + num_kills - len(kills)):
            if number == 0:
                step = random.choice(range(STEPS["save_steps"], STEPS["max_steps"] + 1, STEPS["save_steps"]))
                fault, moment = {"kill_in_save": step}, f"in checkpoint {step}"
            else:
                seconds = random.uniform(0, duration)
                fault, moment = {"kill_after": seconds}, f"after {seconds:.2f} s"
            moments.append(moment)
            plans += [(f"run-{number}", fault), (f"run-{number}", {"resume_if_possible": True})]
        num_runs += len(moments)
        results = execute(plans)
        for moment, killed, resumed in zip(moments, results[::2], results[1::2]):
            if killed.exit_code != 0:  # of several ranks one may see that another was killed before it is itself
                kills.append(Kill(moment, _difference(resumed, whole)))
    return kills


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

    launches = itertools.count()

    def execute(plans: Sequence[tuple[str, dict[str, Any]]]) -> list[Result]:
        place = folder / f"launch-{next(launches)}"
        runs = {
            f"{number} {name}": describe_run(
                setup.recipe, place / f"{number}-{name}", folder / name / "output", {**options, **fault}
            )
            for number, (name, fault) in enumerate(plans)
        }
        launched = launch_all(engine, place, runs, SECONDS_PER_RUN * (len(plans) + 2))
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
        return f"resuming ended with {resumed.exit_code}: {_last_line(resumed)}"
    found, expected = (load_file(result.output_dir / "adapter_model.safetensors") for result in (resumed, whole))
    if found.keys() != expected.keys():
        return f"tensors {sorted(found.keys() ^ expected.keys())} are missing or unexpected"
    changed = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    return f"tensors differ, first {changed[0]}" if changed else None


def _last_line(result: Result) -> str:
    return (result.stderr().strip().splitlines() or ["nothing on stderr"])[-1]
