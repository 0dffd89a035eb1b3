"""`parscale verify`: does an exported checkpoint compute what its source computed?"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .output import check_writable, hide_progress_bars, write_json


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder that `parscale export` made.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
) -> None:
    """Load an export in a fresh process, with the code in its folder, and compare it with its reference logits.

    Ends with exit code 1 if they differ by more than the tolerance that is stored with them.
    """
    check_writable(json_file)
    hide_progress_bars()
    from ..checkpoints.verifying import verify_checkpoint

    report = verify_checkpoint(folder)
    figures = (
        f"largest difference of logits {report.largest_difference:.3g} (tolerance {report.tolerance:.3g}), same most "
        f"likely token at {report.num_same_choices} of {report.num_tokens} positions"
    )
    print(f"{'pass' if report.passed else 'FAIL'}: {folder}, {figures}")
    write_json(json_file, {**asdict(report), "passed": report.passed})
    if not report.passed:
        sys.exit(1)
