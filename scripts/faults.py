"""Kill training at random moments, under every engine, and see whether the resumed run ends with the same tensors.

    python scripts/faults.py                     # 20 kills for each engine, about an hour on 2 cores
    python scripts/faults.py --num_kills 4 --engine zero3

Writes the table of docs/reliability.md, and ends with an error where a resumed run differs. What is finished is kept
in runs/faults.json and not done again, as long as neither the code nor the number of kills changes.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / "runs" / "faults.json"
DOCUMENT = ROOT / "docs" / "reliability.md"
sys.path.insert(0, str(ROOT / "tests"))
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")

import accelerate  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from support.faults import ENGINES, SETUPS, Kill, in_one_process, kill_and_resume, on_two_processes  # noqa: E402
from support.recipe_runs import Material, RecipeServer  # noqa: E402

from parscale_adapt.files import write_text  # noqa: E402


ONE_PROCESS = "one process"
_TABLE = re.compile(r"(?<=<!-- kills -->\n).*(?=<!-- end of kills -->)", re.DOTALL)


class Results:
    """Kills by engine and setup that were counted before, for the same code and the same number of kills."""

    def __init__(self, num_kills: int):
        digest = hashlib.sha256(str(num_kills).encode())
        for folder in ("parscale_adapt", "recipes", "tests/support"):
            for path in sorted((ROOT / folder).rglob("*.py")):
                digest.update(path.read_bytes())
        self._key = digest.hexdigest()
        stored = json.loads(STATE.read_text()) if STATE.is_file() else {}
        self._kills = stored["kills"] if stored.get("key") == self._key else {}

    def get(self, engine: str, setup: str) -> list[Kill] | None:
        found = self._kills.get(f"{engine}: {setup}")
        return None if found is None else [Kill(**kill) for kill in found]

    def add(self, engine: str, setup: str, kills: list[Kill]) -> None:
        self._kills[f"{engine}: {setup}"] = [asdict(kill) for kill in kills]
        STATE.parent.mkdir(exist_ok=True)
        write_text(STATE, json.dumps({"key": self._key, "kills": self._kills}))


def kills_under(
    engine: str, num_kills: int, material: Material, folder: Path, results: Results
) -> dict[str, list[Kill]]:
    """Kills by setup, `num_kills` in all."""
    shares = [num_kills // len(SETUPS) + (index < num_kills % len(SETUPS)) for index in range(len(SETUPS))]
    server = RecipeServer(folder) if engine == ONE_PROCESS else None
    found = {}
    try:
        for (name, setup), share in zip(SETUPS.items(), shares):
            counted = results.get(engine, name)
            if counted is not None:
                found[name] = counted
                continue
            place = folder / name.replace(", ", "-").replace(" ", "-")
            if server is not None:
                execute = in_one_process(server, setup, material, place)
            else:
                execute = on_two_processes(engine, setup, material, place)
            found[name] = kill_and_resume(execute, share) if share else []
            results.add(engine, name, found[name])
            for kill in found[name]:
                print(f"{engine}, {name}: killed {kill.moment}, {kill.problem or 'the same end'}", flush=True)
    finally:
        if server is not None:
            server.close()
    return found


def table(found: dict[str, dict[str, list[Kill]]]) -> str:
    """Markdown: how many of the killed runs ended as the run that nothing happened to."""
    lines = ["| engine | " + " | ".join(SETUPS) + " | all |", "|---" * (len(SETUPS) + 2) + "|"]
    for engine, by_setup in found.items():
        cells = [_count(kills) for kills in by_setup.values()]
        lines.append(
            f"| {engine} | {' | '.join(cells)} | {_count([k for kills in by_setup.values() for k in kills])} |"
        )
    return "\n".join(lines)


def _count(kills: list[Kill]) -> str:
    return f"{sum(kill.problem is None for kill in kills)} of {len(kills)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_kills", type=int, default=20, help="kills for each engine")
    parser.add_argument("--engine", choices=(ONE_PROCESS, *ENGINES), help="one only; the table is printed then")
    args = parser.parse_args()
    results = Results(args.num_kills)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "material").mkdir()
        material = Material(folder / "material")
        for engine in (args.engine,) if args.engine else (ONE_PROCESS, *ENGINES):
            place = folder / engine.replace(" ", "-")
            place.mkdir()
            found[engine] = kills_under(engine, args.num_kills, material, place, results)
    text = table(found)
    print(text)
    if args.engine is None:
        versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers, accelerate))
        commit = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        note = (
            f"`make faults`, {os.cpu_count()}-core {platform.machine()} CPU, {versions}, commit {commit or 'unknown'}."
        )
        document = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(_TABLE.sub(lambda _: f"\n{text}\n\n{note}\n\n", document), encoding="utf-8")
    problems = [
        kill.problem for by_setup in found.values() for kills in by_setup.values() for kill in kills if kill.problem
    ]
    if args.engine is None:
        STATE.unlink()
    if problems:
        sys.exit(f"{len(problems)} resumed runs did not end as they should, first: {problems[0]}")


if __name__ == "__main__":
    main()
