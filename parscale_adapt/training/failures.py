"""How a run that goes wrong ends: one sentence, and a traceback where only that can explain it.

The standard library alone, so that whatever starts a program can use it.
"""

import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


# What wrong input and full disks raise. Anything else is a bug, whose traceback Python shows.
INPUT_ERRORS = (ValueError, TypeError, OSError)
TRACEBACK_VARIABLE = "PARSCALE_TRACEBACK"
SECONDS_FOR_THE_MAIN_PROCESS = 30


class Interruption(Exception):
    """What ends a run through no fault of its own, and is told without type and traceback."""

    exit_code = 1


class SaveFailed(Interruption):
    """The disk did not take what was to be saved."""


class Terminated(Interruption):
    """The process was asked to end by SIGTERM."""

    exit_code = 128 + signal.SIGTERM  # as a shell tells it


class TrainingStopped(RuntimeError):
    """An error after the first step, which is the `__cause__`.

    Args:
        step: steps that were trained.
        error: what went wrong.
        checkpoint: the last checkpoint whose save was verified, if there is one.
    """

    def __init__(self, step: int, error: BaseException, checkpoint: str | None):
        self.checkpoint = checkpoint
        kept = "no checkpoint was saved" if checkpoint is None else f"the last verified checkpoint is {checkpoint}"
        reason = f", {error}" if isinstance(error, Interruption) else f" by {describe(error)}"
        super().__init__(f"training stopped after step {step}{reason}; {kept}")


def describe(error: BaseException) -> str:
    """Type and message of an error in one line."""
    return f"{type(error).__name__}: {_one_line(error)}"


@contextmanager
def ending_in_one_sentence(resume_command: str) -> Iterator[None]:
    """End the process with exit code 1 and one sentence on stderr where something goes wrong inside.

    Before the first step the sentence stands alone, unless the environment variable `PARSCALE_TRACEBACK` is set;
    afterwards ([`TrainingStopped`]) it follows the traceback, but for a full disk and SIGTERM, which has exit code 143.

    Args:
        resume_command: what goes on from the last checkpoint.
    """
    try:
        yield
    except TrainingStopped as stop:
        advice = "" if stop.checkpoint is None else f"; go on with: {resume_command}"
        cause = stop.__cause__ or stop
        sentence = f"{stop}{advice}"
        if isinstance(cause, Interruption):
            _end(cause, sentence, _wants_tracebacks(), cause.exit_code)
        _end(cause, sentence, shows_traceback=True)
    except INPUT_ERRORS as error:
        _end(error, _one_line(error), _wants_tracebacks())


def command_to_resume(script: str, arguments: Sequence[str]) -> str:
    """The command that goes on from a run's last checkpoint, with the launcher that started this process.

    Args:
        script: the recipe, as it was called.
        arguments: its arguments.
    """
    try:
        started = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:  # there is no such file outside Linux
        started = []
    launcher = started[: started.index(script)] if script in started else ["python"]
    resume = ["--resume_from_checkpoint", "true"]
    given = [*arguments[:-2]] if list(arguments[-2:]) == resume else [*arguments]
    return shlex.join([*launcher, script, *given, *resume])


def _wants_tracebacks() -> bool:
    return bool(os.environ.get(TRACEBACK_VARIABLE))


def _end(error: BaseException, sentence: str, shows_traceback: bool, exit_code: int = 1) -> NoReturn:
    rank = int(os.environ.get("RANK", "0"))
    if isinstance(error, Terminated):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher repeats it once a rank has ended
        if rank > 0:
            sys.exit(exit_code)
    if rank > 0:
        # What stops all ranks is said once: the launcher ends the others when the main process has ended.
        time.sleep(SECONDS_FOR_THE_MAIN_PROCESS)
        sentence = f"rank {rank}: {sentence}"
    if shows_traceback:
        traceback.print_exception(error)
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(exit_code)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
