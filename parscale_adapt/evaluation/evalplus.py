"""EvalPlus in an environment of its own, which runs programs that models wrote.

A program that a model wrote may do anything. EvalPlus limits its time and memory and takes dangerous functions away,
which is no sandbox. Around it, a fresh folder is home and working folder, no variable of this environment is handed on,
and where the system allows it (`unshare`) there is no network and no sight of other processes. What the user may read
and write, a program may too: for stronger walls run the evaluation in a container.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .measures import Scores
from .programs import DATASETS, Programs, pass_metrics, sample_lines


_SECONDS_TO_ANSWER = 120
_NAMESPACES = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--mount-proc", "--kill-child")
_OVERRIDES = {"humaneval": "HUMANEVAL_OVERRIDE_PATH", "mbpp": "MBPP_OVERRIDE_PATH"}
_VERSION = "import evalplus.evaluate, importlib.metadata as found; print(found.version('evalplus'))"
_MAX_REASON = 400


@dataclass(frozen=True)
class EvalPlus:
    """An environment that has EvalPlus, and the walls around what it runs.

    Args:
        python: of the environment.
        version: of EvalPlus.
        walls: command that the other is put behind; empty where the system has none.
    """

    python: Path
    version: str
    walls: tuple[str, ...]

    @property
    def isolation(self) -> str:
        """What separates the programs from this machine, for readers of a score."""
        around = (
            "without network and without sight of other processes (unshare)"
            if self.walls
            else "with network, since this system lets nobody `unshare` it"
        )
        return f"{around}, in a folder and with an environment of their own, and with the user's access to files"

    @property
    def environment(self) -> dict[str, str]:
        """For the record of a score."""
        return {"evalplus": self.version, "isolation": self.isolation}

    def run(self, program: Programs, written: Scores) -> Scores:
        """Run programs, as `evalplus.sanitize` leaves them; one item for each problem says which passed.

        Raises:
            ValueError: EvalPlus failed.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            has_more = any(problem.get("plus_input") for problem in program.problems)
            for dataset in DATASETS:
                rows = program.problems if dataset == program.dataset else []
                (folder / f"{dataset}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            lines = "".join(json.dumps(line) + "\n" for line in sample_lines(written))
            (folder / "samples.jsonl").write_text(lines)
            self._call(folder, ["evalplus.sanitize", "samples.jsonl"])
            options = [] if has_more else ["--base_only"]
            self._call(
                folder, ["evalplus.evaluate", program.dataset, "--samples", "samples-sanitized.jsonl", *options]
            )
            results = json.loads((folder / "samples-sanitized_eval_results.json").read_text())["eval"]
        return _scores(program, results, has_more)

    def _call(self, folder: Path, arguments: Sequence[str]) -> None:
        variables = {"PATH": os.defpath, "HOME": str(folder), "XDG_CACHE_HOME": str(folder), "TMPDIR": str(folder)}
        variables |= {name: str(folder / f"{dataset}.jsonl") for dataset, name in _OVERRIDES.items()}
        command = [*self.walls, str(self.python), "-m", *arguments]
        done = subprocess.run(
            command, cwd=folder, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            reason = " ".join(done.stderr.split())[-_MAX_REASON:]
            raise ValueError(f"{arguments[0]} in {self.python} failed with exit code {done.returncode}: {reason}")


def find_evalplus(python: Path) -> EvalPlus:
    """Look at an environment before anything is loaded.

    Raises:
        ValueError: there is no such Python, or it has no EvalPlus.
    """
    python = python.expanduser().absolute()
    advice = "make one: python -m venv evalplus; evalplus/bin/pip install evalplus; then name evalplus/bin/python"
    if not os.access(python, os.X_OK) or python.is_dir():
        raise ValueError(
            f"`execute_code` must name the Python of an environment with EvalPlus, got {python}: {advice}."
        )
    try:
        done = subprocess.run(
            [python, "-c", _VERSION],
            capture_output=True,
            text=True,
            timeout=_SECONDS_TO_ANSWER,
            cwd=tempfile.gettempdir(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"`execute_code` names {python}, which does not run: {error}") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"`execute_code` names {python}, which has no EvalPlus ({reason}): {advice}.")
    return EvalPlus(python, done.stdout.split()[-1], _walls())


def _walls() -> tuple[str, ...]:
    try:
        done = subprocess.run([*_NAMESPACES, "true"], capture_output=True, timeout=_SECONDS_TO_ANSWER)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return _NAMESPACES if done.returncode == 0 else ()


def _scores(program: Programs, results: dict[str, list[dict[str, Any]]], has_more: bool) -> Scores:
    items = []
    for problem in program.problems:
        found = results[problem["task_id"]]
        base = [one["base_status"] == "pass" for one in found]
        item = {"task_id": problem["task_id"], "base": base}
        if has_more:
            item["plus"] = [right and one["plus_status"] == "pass" for right, one in zip(base, found)]
        items.append(item)
    tests = ("base", "plus") if has_more else ("base",)
    counts = {name: [(len(item[name]), sum(item[name])) for item in items] for name in tests}
    return Scores(pass_metrics(program.name, counts), items)
