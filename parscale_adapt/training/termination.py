"""What a run does when it is asked to end, as schedulers do before they take a machine away."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
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

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGTERM inside; Python allows that on the main thread alone."""
        self._is_asked = self._has_agreed = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
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
