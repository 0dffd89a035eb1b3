"""Is an exported checkpoint what its source was, loaded by a process that knows nothing of it?"""

import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from . import fresh_process
from .folders import find_kind
from .fresh_process import LOGITS
from .headers import REFERENCE_FILE
from .reference import Reference, read_reference
from .tensors import TensorFiles, hash_tensor


_ROOT = Path(__file__).parents[2]


@dataclass
class Comparison:
    """Logits that were computed in one dtype, against those of the source.

    `largest_difference` is of single logits; `num_same_choices` counts the tokens with the same most likely follower.
    """

    dtype: str
    largest_difference: float
    tolerance: float
    num_same_choices: int
    num_tokens: int

    @property
    def passed(self) -> bool:
        """Whether no logit is farther off than the tolerance."""
        return self.largest_difference <= self.tolerance


@dataclass
class VerifyReport:
    """What was found: tensors of streams that are not those of the source, and how far logits are off.

    `num_stream_tensors` counts the tensors that were compared. It is None for exports of version 0.1.0, which hold
    nothing to compare them with.
    """

    folder: str
    made_by: str
    num_stream_tensors: int | None
    changed_tensors: list[str]
    comparisons: list[Comparison]

    @property
    def passed(self) -> bool:
        """Whether the checkpoint is what its source was."""
        return not self.changed_tensors and all(comparison.passed for comparison in self.comparisons)

    def to_dict(self) -> dict[str, Any]:
        """All fields and results, ready for JSON, which has no infinity."""
        comparisons = [
            {
                **asdict(comparison),
                "largest_difference": difference
                if math.isfinite(difference := comparison.largest_difference)
                else None,
                "passed": comparison.passed,
            }
            for comparison in self.comparisons
        ]
        return {**asdict(self), "comparisons": comparisons, "passed": self.passed}


def verify_checkpoint(folder: Path) -> VerifyReport:
    """Compare the streams of an exported checkpoint with those of its source, bit for bit, and, loaded in a fresh
    process, its logits.

    A standalone checkpoint is loaded with its own code (`trust_remote_code=True`), without this package.

    Raises:
        ValueError: a file is missing or damaged, or the checkpoint doesn't load.
    """
    reference = read_reference(folder)
    kind = find_kind(folder)
    hashes, tensors = reference.stream_tensors, TensorFiles(folder)
    changed = _changed_tensors(tensors, hashes or {})
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "logits.safetensors")
        _run(folder.absolute(), output, needs_package=kind.name == "published")
        logits = load_file(output)
    comparisons = [_compare(folder, end, reference, logits) for end in LOGITS if end in reference.tolerances]
    return VerifyReport(str(folder), reference.made_by, None if hashes is None else len(hashes), changed, comparisons)


def _changed_tensors(tensors: TensorFiles, hashes: dict[str, str]) -> list[str]:
    return [
        name
        for name, expected in hashes.items()
        if name not in tensors.shapes or hash_tensor(tensors.read(name)) != expected
    ]


def _compare(folder: Path, end: str, reference: Reference, logits: dict[str, torch.Tensor]) -> Comparison:
    """Compare the logits whose names end so, over all batches."""
    names = [name for name in reference.tensors if name.rpartition(".")[2] == end]
    expected = [reference.tensors[name].flatten(0, -2).float() for name in names]
    found = [logits[name].float() for name in names]
    for ours, theirs in zip(found, expected):
        if ours.shape != theirs.shape:
            raise ValueError(
                f"{folder} must hold files of one model, got logits of the shape {tuple(ours.shape)} where its reference "
                f"has {tuple(theirs.shape)}: export again."
            )
    # A difference that is no number is infinitely large.
    difference = (torch.cat(found) - torch.cat(expected)).abs().nan_to_num(nan=float("inf"))
    is_same = torch.cat(found).argmax(-1) == torch.cat(expected).argmax(-1)
    return Comparison(
        dtype=str(LOGITS[end] or reference.tensors[names[0]].dtype).removeprefix("torch."),
        largest_difference=float(difference.max()),
        tolerance=reference.tolerances[end],
        num_same_choices=int(is_same.sum()),
        num_tokens=is_same.numel(),
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
