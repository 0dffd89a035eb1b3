"""Runs recipes in forked processes and records what they train on, bit for bit.

    python tests/support/recipe_recorder.py                                     # runs come as JSON lines on stdin
    accelerate launch --config_file ... tests/support/recipe_recorder.py FILE   # or as a JSON list in a file, on every rank

The libraries are imported once; each run is a fork that executes the recipe's own script with its own arguments, so
that a run costs seconds and can be killed. A run is described by `recipe_runs.Run`.
"""

import contextlib
import gc
import hashlib
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, is_deepspeed_available
from torch.distributed.tensor import DTensor

from parscale_adapt import training
from parscale_adapt.training import (
    StreamDistillationTrainer,
    StreamDPOTrainer,
    StreamGRPOTrainer,
    StreamRewardTrainer,
    StreamTrainer,
    failures,
)
from parscale_adapt.training.stream_training import StreamTraining
from support.injected_faults import inject
from support.recipe_runs import PROBE


RANK = int(os.environ.get("RANK", 0))
TRAINERS = (StreamTrainer, StreamDPOTrainer, StreamRewardTrainer, StreamGRPOTrainer, StreamDistillationTrainer)


def execute(run: dict) -> int:
    """Run one recipe in a fork; the exit code, negative for a signal as `subprocess` gives it."""
    process = os.fork()
    if process == 0:
        os._exit(_execute_here(run))
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _execute_here(run: dict) -> int:
    folder = Path(run["record"])
    folder.mkdir(parents=True, exist_ok=True)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{name}.{RANK}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(run["environment"], TORCHELASTIC_USE_AGENT_STORE="False")
    for trainer in TRAINERS:
        _record_batches(trainer, folder / f"batches.{RANK}.jsonl", run["kill_at_batch"], run["learning"])
        _record_logits(trainer, folder / f"logits.{RANK}.pt")
    if run["kill_in_save"]:
        _kill_in_save(run["kill_in_save"])
    if run["spoil_gradient_at"] is not None:
        for trainer in TRAINERS:
            _spoil_gradient(trainer, run["spoil_gradient_at"])
    if run["save_shards"]:
        StreamTraining.save_model = lambda self, output_dir, **kwargs: self._save(output_dir)
    if run["fsdp_on_cpu"]:
        _shard_on_cpu()
    _partition_small_parameters()
    failures.SECONDS_FOR_THE_MAIN_PROCESS = 0  # nobody ends the other ranks of a fork
    if run["fail_to_measure"]:
        for trainer in TRAINERS:
            trainer.heldout_loss = _fail
    if run["fault"] is not None:
        inject(*run["fault"])
    if run["kill_after"] is not None:
        timer = threading.Timer(run["kill_after"], os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    sys.argv = [run["script"], *run["arguments"], *_resuming(run)]
    start = time.monotonic()
    try:
        runpy.run_path(run["script"], run_name="__main__")
    except SystemExit as stop:
        return 0 if stop.code is None else int(stop.code)
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        (folder / "duration").write_text(str(time.monotonic() - start))
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _fail(trainer: StreamTraining) -> float:
    raise ValueError("There is nothing to measure.")


def _resuming(run: dict) -> list[str]:
    if not run["resume_if_possible"]:
        return []
    output_dir = Path(run["arguments"][run["arguments"].index("--output_dir") + 1])
    return ["--resume_from_checkpoint", "true"] if any(output_dir.glob("checkpoint-*/verified_save.json")) else []


def _record_batches(
    trainer: type[StreamTraining], path: Path, kill_at_batch: int | None, records_learning: bool
) -> None:
    """Write the ids and the loss of each trained batch, before anything is averaged, and die where the run says so."""
    compute_loss = trainer.compute_loss
    num_batches = 0

    def recording(self, model, inputs, *args, **kwargs):
        nonlocal num_batches
        if not model.training:
            return compute_loss(self, model, inputs, *args, **kwargs)
        if num_batches == kill_at_batch:
            os.kill(os.getpid(), signal.SIGKILL)
        num_batches += 1
        input_ids, labels = _ids_of(inputs), inputs.get("labels", torch.zeros(0))
        kinds = _parameter_kinds(model)
        result = compute_loss(self, model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        line = {
            "step": self.state.global_step,
            "ids": hashlib.sha256(input_ids.numpy().tobytes()).hexdigest(),
            "loss": loss.item().hex(),
            "kinds": kinds,
            "frozen": _hash_of_frozen(model),
        }
        if records_learning:
            line |= {"input_ids": input_ids.tolist(), "labels": labels.tolist()}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return result

    trainer.compute_loss = recording


def _ids_of(inputs: dict) -> torch.Tensor:
    """What is trained on; trainers that sample answers keep questions and answers apart."""
    if "input_ids" in inputs:
        return inputs["input_ids"]
    return torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)


def _spoil_gradient(trainer: type[StreamTraining], batch: int) -> None:
    """Let the gradients of one batch be no numbers, whose loss is finite."""
    compute_loss = trainer.compute_loss
    num_batches = 0

    def spoiling(self, model, inputs, *args, **kwargs):
        nonlocal num_batches
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        if model.training:
            if num_batches == batch:
                loss.register_hook(lambda gradient: gradient * float("nan"))
            num_batches += 1
        return loss

    trainer.compute_loss = spoiling


def _parameter_kinds(model: torch.nn.Module) -> list[str]:
    """How the engine holds the parameters: `DTensor`, `ZeRO-3` or `whole`, with the types of what is trained."""
    kinds = set()
    for parameter in model.parameters():
        holder = (
            "ZeRO-3"
            if getattr(parameter, "ds_persist", True) is False
            else "DTensor"
            if isinstance(parameter, DTensor)
            else "whole"
        )
        kinds.add(f"{holder} {parameter.dtype}".replace("torch.", "") if parameter.requires_grad else holder)
    return sorted(kinds)


def _hash_of_frozen(model: torch.nn.Module) -> str:
    """Of every byte that this rank holds of what is not trained, after the forward."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            digest.update(local.detach().clone().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _record_logits(trainer: type[StreamTraining], path: Path) -> None:
    """Write what the trained model, still in its engine, says to a fixed input."""
    heldout_loss = trainer.heldout_loss

    def recording(self):
        model = self.model_wrapped
        model.eval()
        with torch.no_grad():
            torch.save(model(input_ids=PROBE, use_cache=False).logits, path)
        return heldout_loss(self)

    trainer.heldout_loss = recording


def _kill_in_save(step: int) -> None:
    """Die while the checkpoint of this step is half written: the adapter is there, the optimizer is not."""
    save = StreamTraining._save_optimizer_and_scheduler

    def dying(self, output_dir):
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, output_dir)

    StreamTraining._save_optimizer_and_scheduler = dying


def _shard_on_cpu() -> None:
    """Let accelerate enter FSDP on the CPU, which it does for accelerator devices only; for tests alone."""
    initialize = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        is_first = not AcceleratorState._shared_state
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if is_first and fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp


def _partition_small_parameters() -> None:
    """Let ZeRO-3 partition every parameter; by default it keeps those below 100,000 values whole, here all of them."""
    prepare = DeepSpeedPlugin.__post_init__

    def with_threshold(self):
        prepare(self)
        if self.zero_stage == 3:
            self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = with_threshold


def serve() -> None:
    """Execute the runs that come on stdin; answer each with its exit code."""
    for line in sys.stdin:
        print(execute(json.loads(line)), flush=True)


def execute_all(path: Path) -> None:
    """Execute the runs of a file one after the other; every rank does so at its own speed."""
    for number, run in enumerate(json.loads(path.read_text())):
        run["environment"]["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1 + number)
        code = execute(run)
        Path(run["record"], f"exit.{RANK}").write_text(str(code))


def import_for_all_runs() -> None:
    """What each fork would import again, and would search for garbage again."""
    for name in training.__all__:
        getattr(training, name)
    importlib.import_module("parscale_adapt.training.plots")
    if is_deepspeed_available():  # accelerate then imports it whatever the engine
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module("deepspeed")
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    import_for_all_runs()
    if len(sys.argv) > 1:
        execute_all(Path(sys.argv[1]))
    else:
        serve()
