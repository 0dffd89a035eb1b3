"""How a run that goes wrong ends: one sentence, and a traceback where only that can explain it.

The standard library alone, so that whatever starts a program can use it.
"""

import os
import shlex
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
        super().__init__(f"training stopped after step {step} by {describe(error)}; {kept}")


def describe(error: BaseException) -> str:
    """Type and message of an error in one line."""
    return f"{type(error).__name__}: {_one_line(error)}"


@contextmanager
def ending_in_one_sentence(resume_command: str) -> Iterator[None]:
    """End the process with exit code 1 and one sentence on stderr where something goes wrong inside.

    Before the first step the sentence stands alone, unless the environment variable `PARSCALE_TRACEBACK` is set;
    afterwards ([`TrainingStopped`]) it follows the traceback.

    Args:
        resume_command: what goes on from the last checkpoint.
    """
    try:
        yield
    except TrainingStopped as stop:
        advice = "" if stop.checkpoint is None else f"; go on with: {resume_command}"
        _end(stop.__cause__ or stop, f"{stop}{advice}", shows_traceback=True)
    except INPUT_ERRORS as error:
        _end(error, _one_line(error), shows_traceback=bool(os.environ.get(TRACEBACK_VARIABLE)))


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


def _end(error: BaseException, sentence: str, shows_traceback: bool) -> NoReturn:
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        # What stops all ranks is said once: the launcher ends the others when the main process has ended.
        time.sleep(SECONDS_FOR_THE_MAIN_PROCESS)
        sentence = f"rank {rank}: {sentence}"
    if shows_traceback:
        traceback.print_exception(error)
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(1)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
