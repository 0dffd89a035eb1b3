"""Does an exported checkpoint compute what its source computed, loaded by a process that knows nothing of it?"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from . import fresh_process
from .folders import TensorFiles, read_json
from .published import PUBLISHED_TYPE
from .reference import REFERENCE_FILE, read_reference


_ROOT = Path(__file__).parents[2]


@dataclass
class VerifyReport:
    """The largest difference between computed and stored logits, and how far they may differ."""

    folder: str
    made_by: str
    largest_difference: float
    tolerance: float
    num_same_choices: int
    num_tokens: int

    @property
    def passed(self) -> bool:
        """Whether the checkpoint computes what its source computed."""
        return self.largest_difference <= self.tolerance


def verify_checkpoint(folder: Path) -> VerifyReport:
    """Load an exported checkpoint in a fresh process and compare its logits with those of its source.

    A standalone checkpoint is loaded with its own code (`trust_remote_code=True`), without this package.

    Raises:
        ValueError: a file is missing or damaged, or the checkpoint doesn't load.
    """
    reference = read_reference(folder)
    config = read_json(folder / "config.json")
    TensorFiles(folder)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "logits.safetensors")
        _run(folder.absolute(), output, needs_package=config.get("model_type") == PUBLISHED_TYPE)
        logits = load_file(output)["logits"]
    if logits.shape != reference.logits.shape:
        raise ValueError(
            f"{folder} computes logits of the shape {tuple(logits.shape)}, its reference has "
            f"{tuple(reference.logits.shape)}: the files belong to different models."
        )
    # A difference that is no number is infinitely large.
    difference = (logits - reference.logits).abs().nan_to_num(nan=float("inf"))
    same = logits.argmax(-1) == reference.logits.argmax(-1)
    return VerifyReport(
        str(folder), reference.made_by, float(difference.max()), reference.tolerance, int(same.sum()), same.numel()
    )


def _run(folder: Path, output: Path, needs_package: bool) -> None:
    """Compute logits in a process of its own."""
    command = [sys.executable, "-P", fresh_process.__file__, str(folder), str(folder / REFERENCE_FILE), str(output)]
    environment = dict(os.environ)
    if needs_package:
        command.append("parscale_adapt")
        environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env=environment, cwd=output.parent, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["the process ended without a message"]
        raise ValueError(f"{folder} does not load in a fresh process: {reason[0]}")
