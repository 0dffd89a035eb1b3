"""What goes wrong in a run of `recipe_recorder.py` besides being killed; by name, with the step and an argument."""

import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects
from transformers import trainer as transformers_trainer

from parscale_adapt.training import StreamTrainer, report, saving


BYTES_OF_A_FULL_DISK = 1000


def inject(name: str, step: int, argument: str) -> None:
    """Let one of the faults below happen in this process."""
    FAULTS[name](step, argument)


@contextmanager
def _full_disk():
    """Every file ends after some bytes: the writers of Python, torch and safetensors see real errors."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES_OF_A_FULL_DISK, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _full_during(method: str) -> Callable[[int, str], None]:
    def inject_here(step: int, argument: str) -> None:
        original = getattr(StreamTrainer, method)

        def failing(self, *args, **kwargs):
            if self.state.global_step != step:
                return original(self, *args, **kwargs)
            with _full_disk():
                return original(self, *args, **kwargs)

        setattr(StreamTrainer, method, failing)

    return inject_here


def _full_for_the_model(step: int, argument: str) -> None:
    original = report.save_final_model

    def failing(*args, **kwargs):
        with _full_disk():
            original(*args, **kwargs)

    report.save_final_model = failing


def _before_step(action: Callable[[str], object]) -> Callable[[int, str], None]:
    def inject_here(step: int, argument: str) -> None:
        original = StreamTrainer.training_step

        def acting(self, *args, **kwargs):
            if self.state.global_step == step:
                action(argument)
            return original(self, *args, **kwargs)

        StreamTrainer.training_step = acting

    return inject_here


def _terminate(rank: str) -> None:
    if os.environ.get("RANK", "0") == rank:
        for worker in multiprocessing.active_children():  # as schedulers do, which ask all processes
            os.kill(worker.pid, signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)


def _jumping_clock(step: int, argument: str) -> None:
    """Each checkpoint is older than the one before, as files and clock tell it."""
    record, now = saving.record_verified, time.time
    days = 0

    def jumping(folder, num_tensors):
        nonlocal days
        record(folder, num_tensors)
        days -= 1
        then = now() + 86400 * days
        for path in (*Path(folder).iterdir(), Path(folder)):
            os.utime(path, (then, then))
        time.time = lambda: now() + 86400 * days

    saving.record_verified = jumping


class _Hub:
    """Takes what is pushed into a folder, or refuses it where there is none."""

    def __init__(self, folder: str):
        self.folder = folder

    def create_repo(self, name, **kwargs):
        if self.folder == "no repository":
            raise ConnectionError("nobody answers")
        return type("Url", (str,), {"repo_id": name})(name)

    def upload_folder(self, folder_path, ignore_patterns, **kwargs):
        if not self.folder:
            raise HfHubHTTPError("403 Forbidden", response=MagicMock())
        paths = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        for path in filter_repo_objects(paths, ignore_patterns=ignore_patterns):
            target = Path(self.folder, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path, path), target)
        with Path(self.folder).with_suffix(".pushes").open("a") as file:
            file.write("pushed\n")


def _hub(step: int, argument: str) -> None:
    transformers_trainer.hf_api = lambda: _Hub(argument)


FAULTS = {
    "disk full for the adapter": _full_during("save_model"),
    "disk full for the optimizer": _full_during("_save_optimizer_and_scheduler"),
    "disk full for the model": _full_for_the_model,
    "a file vanishes": _before_step(os.unlink),
    "SIGTERM": _before_step(_terminate),
    "the clock jumps": _jumping_clock,
    "hub": _hub,
}
