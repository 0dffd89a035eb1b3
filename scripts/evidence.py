"""Does it help? Streams, LoRA, prefix tuning and full training of SmolLM2-135M on the same unseen tokens.

    python scripts/evidence.py --processes 2                    # on two cores, resumable
    python scripts/evidence.py --processes 2 --deadline 3300    # start no run after 55 minutes
    python scripts/evidence.py --device cuda                    # all of it on one GPU
    python scripts/evidence.py --only lora8+streams4 --seed 0 --csv mine.csv --adapters mine  # one row, and its adapter

First come short sweeps of the learning rate, each one row of docs/evidence/sweeps.csv, then the runs themselves, each
one row of docs/evidence/runs.csv (docs/evidence.md says what they show). Finished rows are skipped. A killed run goes on
where its state was kept last.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import multiprocessing
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from evidence_corpus import Corpus, load_corpus
from evidence_methods import Experiment
from evidence_plan import experiments, finished_sweeps, sweep_plan
from evidence_rows import DIVERGED, FINISHED, SKIPPED, Table, shared_columns
from evidence_training import TOKENS_PER_STEP, DivergedError, Run
from peft import PeftModel
from smollm2 import smollm2_folder
from transformers import AutoModelForCausalLM


ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
# What a process needs besides its tensors, seen on this model: logits of a batch in float32, and their gradients.
LOGITS_GIB = 1.5
HIDDEN_GIB_PER_ROW = 0.5 / 1024  # activations of all layers, per row of hidden states, not checkpointed


@dataclasses.dataclass(frozen=True)
class Place:
    """Where runs happen."""

    device: str
    model: Path
    corpus: Path
    state: Path
    adapters: Path | None = None


class _Worker:
    """What a process keeps between runs: the backbone as it was read, and the corpus."""

    place: Place
    corpus: Corpus
    backbone: torch.nn.Module

    @classmethod
    def start(cls, place: Place) -> None:
        torch.set_num_threads(1)  # one more process gives more than one more thread
        if place.device != "cpu":
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # costs a kernel for every tensor
            torch.set_float32_matmul_precision("high")  # TF32
        cls.place = place
        cls.corpus = load_corpus(place.corpus, place.model)
        cls.backbone = AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32).to(place.device)

    @classmethod
    def run(cls, experiment: Experiment, seed: int) -> dict[str, object]:
        """One row; a run that can't be finished is a row that says why."""
        row = _described(experiment, seed)
        shortage = _shortage(experiment, torch.device(cls.place.device))
        if shortage:
            return {**row, "status": f"{SKIPPED}: {shortage}"}
        try:
            return {**row, **cls._train(experiment, seed), "status": FINISHED}
        except DivergedError as error:
            return {**row, "status": f"{DIVERGED}: {error}"}
        except Exception:
            traceback.print_exc()
            return {**row, "status": f"{SKIPPED}: {traceback.format_exc(limit=0).strip().splitlines()[-1]}"}

    @classmethod
    def _train(cls, experiment: Experiment, seed: int) -> dict[str, object]:
        device = torch.device(cls.place.device)
        state = cls.place.state / f"{experiment.name.replace('/', '_')}_seed{seed}.safetensors"
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        run = Run(experiment, seed, copy.deepcopy(cls.backbone), cls.corpus, state)
        before = run.tuning_loss()
        run.train()
        figures = run.measure()
        after = figures["tuning_loss"]
        if after > before:
            raise DivergedError(f"the loss on the tuning documents went from {before:.4f} to {after:.4f}")
        run.forget_state()
        if cls.place.adapters is not None and isinstance(run.model, PeftModel):
            run.model.save_pretrained(cls.place.adapters / f"{experiment.name}_seed{seed}")
        peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else _peak_of_process()
        return {
            **figures,
            "tuning_loss_before": before,
            "curve": run.curve_text(),
            "seconds": run.progress.seconds,
            "peak_memory_gib": peak,
        }


def _described(experiment: Experiment, seed: int) -> dict[str, object]:
    fields = dataclasses.asdict(experiment)
    rates = {f"rate_{name}": rate for name, rate in experiment.rates.given().items()}
    return {
        **{name: value for name, value in fields.items() if name not in ("rates", "transforms")},
        **rates,
        "seed": seed,
        "stage": "sweep" if experiment.is_sweep else "main",
        "model": "SmolLM2-135M-Instruct",
        "transforms": "+".join(experiment.transforms) if experiment.method not in ("backbone", "lora") else "",
        "tokens": experiment.steps * TOKENS_PER_STEP,
    }


def _shortage(experiment: Experiment, device: torch.device) -> str | None:
    """Why there is too little memory for a run, as an estimate; None if there isn't."""
    rows = experiment.num_streams * TOKENS_PER_STEP
    weights = 4 * 0.5 * (4 if experiment.method == "full" else 1.3)
    needed = weights + LOGITS_GIB + HIDDEN_GIB_PER_ROW * min(rows, 4 * TOKENS_PER_STEP)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available_memory()
    if needed * GIB <= free:
        return None
    return f"needs about {needed:.1f} GiB, and {free / GIB:.1f} GiB are free"


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _peak_of_process() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def run_all(
    todo: list[tuple[Experiment, int]], table: Table, pool: ProcessPoolExecutor, end: float
) -> list[dict[str, str]]:
    """Run what the table lacks, in order; rows are written as they finish. Nothing starts after `end`."""
    waiting = [(run, seed) for run, seed in todo if not table.has(run.name, seed)]
    print(f"{len(todo) - len(waiting)} of {len(todo)} rows are there, {len(waiting)} to run", flush=True)
    running: set[Future] = set()
    while waiting or running:
        while waiting and len(running) < pool._max_workers and time.monotonic() < end:
            running.add(pool.submit(_Worker.run, *waiting.pop(0)))
        if not running:
            print(f"the deadline is reached: {len(waiting)} rows are left; the same command goes on with them")
            sys.exit(0)
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            row = future.result()
            table.add(row)
            loss = f"{row['heldout_loss']:.4f}" if "heldout_loss" in row else ""
            print(f"{row['name']} seed {row['seed']}: {row['status']} {loss}", flush=True)
    return table.rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--csv", type=Path, default=ROOT / "docs" / "evidence" / "runs.csv", help="table of the runs")
    parser.add_argument("--sweeps", type=Path, default=ROOT / "docs" / "evidence" / "sweeps.csv", help="theirs")
    parser.add_argument("--model", type=Path, help="SmolLM2's folder (default: that of scripts/smollm2.py)")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "evidence", help="the corpus, and runs' states")
    parser.add_argument("--adapters", type=Path, help="keep the streams and LoRAs that are trained in this folder")
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which no run starts")
    parser.add_argument("--only", help="name of an experiment")
    parser.add_argument("--seed", type=int, help="with --only, its seed (default: all)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was given, but torch sees no GPU here: leave it out.")
    end = time.monotonic() + arguments.deadline
    model = arguments.model or smollm2_folder()
    corpus, state = arguments.folder / "corpus.safetensors", arguments.folder / "state"
    place = Place(arguments.device, model, corpus, state, arguments.adapters)
    shared = shared_columns(load_corpus(place.corpus, model).fingerprint, torch.device(arguments.device))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, context, _Worker.start, (place,)) as pool:
        if arguments.only is not None and arguments.only.startswith("sweep/"):
            todo, table = _planned(sweep_plan(), arguments), Table(arguments.sweeps, shared)
        else:
            rows = finished_sweeps(arguments.sweeps, shared["data"])
            table = Table(arguments.csv, shared)
            if rows is None:
                rows = run_all(sweep_plan(), Table(arguments.sweeps, shared), pool, end)
            todo = _planned(experiments(rows, arguments.num_seeds), arguments)
        run_all(todo, table, pool, end)


def _planned(runs: Iterable[tuple[Experiment, int]], arguments: argparse.Namespace) -> list[tuple[Experiment, int]]:
    todo = [(run, seed) for run, seed in runs if arguments.only in (None, run.name) and arguments.seed in (None, seed)]
    if not todo:
        raise ValueError(f"There is no experiment {arguments.only!r} with seed {arguments.seed}.")
    return todo


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
