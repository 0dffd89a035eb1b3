"""What a run logs, line by line in its folder, so that it can be watched while it trains."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import write_text


LOG_FILE = "log.jsonl"


class RunLogCallback(TrainerCallback):
    """Appends each entry of the trainer's log to [`LOG_FILE`] in the output folder, with the `time` in seconds since 1970.

    A line without figures says that training begins, or goes on, at a `step`. A run that is resumed drops what an earlier
    try logged behind its checkpoint. Where the file can't be written, that is said once, and training goes on.
    """

    def __init__(self) -> None:
        self._can_write = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / LOG_FILE
        kept = [line for line in _lines(path) if _step(line) <= state.global_step] if state.global_step else []
        tokens = getattr(state, "num_input_tokens_seen", 0)
        kept.append(_line({"step": state.global_step, "num_input_tokens_seen": tokens}))
        self._write(path, lambda: write_text(path, "".join(f"{line}\n" for line in kept)))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and state.log_history and self._can_write:
            path = Path(args.output_dir) / LOG_FILE
            self._write(path, lambda: _append(path, _line(state.log_history[-1])))

    def _write(self, path: Path, write: Any) -> None:
        try:
            write()
            self._can_write = True
        except OSError as error:
            self._can_write = False
            print(f"{path} can't be written ({error.strerror}): this run can't be watched.", file=sys.stderr)


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps({**entry, "time": time.time()}, default=str)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _step(line: str) -> float:
    """Of an entry; behind all others where it is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")
