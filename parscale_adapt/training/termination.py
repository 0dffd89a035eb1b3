"""What a run does when it is asked to end, as schedulers do before they take a machine away."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .failures import Terminated


class TerminationCallback(TrainerCallback):
    """On SIGTERM the running step is finished, a checkpoint is saved, and [`Terminated`] is raised.

    Unlike transformers' `enable_jit_checkpoint`, which saves before the optimizer's step although the batch was
    already counted, lets each rank decide for itself, and lets the run end as if it were complete.

    Args:
        trainer: what is asked to end.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._is_asked = self._has_agreed = False
        self._is_listening = multiprocessing.RawValue("b", False)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGTERM inside; Python allows that on the main thread alone."""
        self._is_asked = self._has_agreed = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        self._is_listening.value = True
        try:
            yield
        finally:
            self._is_listening.value = False
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Let all ranks save, if one of them was asked."""
        if self._agree():
            control.should_save = True

    on_evaluate = on_step_end  # which can take longer than a step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """End the run, now that everything is on the disk."""
        if self._has_agreed:
            raise Terminated("asked to end by SIGTERM")

    def protect_workers(self, loader: DataLoader) -> None:
        """Let workers that read data outlive a SIGTERM to the whole process group, until the checkpoint is saved."""
        loader = getattr(loader, "base_dataloader", loader)  # what accelerate's own iterates over
        if loader.num_workers > 0:
            loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn, self._is_listening)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._is_asked = True

    def _agree(self) -> bool:
        if not self._has_agreed:
            accelerator = self.trainer.accelerator
            if accelerator.num_processes > 1:
                asked = accelerator.reduce(torch.tensor(float(self._is_asked), device=accelerator.device))
                self._has_agreed = bool(asked)
            else:
                self._has_agreed = self._is_asked
        return self._has_agreed


def _start_worker(initialize: Callable[[int], object] | None, is_listening: Any, worker: int) -> None:
    """Run in a worker: what was to be run, and end on SIGTERM only when the run doesn't wait for one any more."""

    def end(number: int, frame: FrameType | None) -> None:
        if not is_listening.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, end)
    if initialize is not None:
        initialize(worker)
