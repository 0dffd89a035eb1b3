"""`parscale verify`: is an exported checkpoint what its source was?"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import check_writable, hide_progress_bars, write_json


if TYPE_CHECKING:
    from ..checkpoints.verifying import VerifyReport

_MAX_NAMES = 3


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder that `parscale export` made.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
) -> None:
    """Compare an export with its source: the tensors of its streams bit for bit, and, loaded in a fresh process with the
    code in its folder, its logits.

    Ends with exit code 1 if a tensor differs or logits are farther off than the tolerances that are stored with them.
    """
    check_writable(json_file)
    hide_progress_bars()
    from ..checkpoints.verifying import verify_checkpoint

    report = verify_checkpoint(folder)
    print(f"{'pass' if report.passed else 'FAIL'}: {folder}")
    for line in _lines(report):
        print(f"  {line}")
    write_json(json_file, report.to_dict())
    if not report.passed:
        sys.exit(1)


def _lines(report: "VerifyReport") -> list[str]:
    changed, count = report.changed_tensors, report.num_stream_tensors
    names = ", ".join(changed[:_MAX_NAMES]) + (
        f" and {len(changed) - _MAX_NAMES} more" if changed[_MAX_NAMES:] else ""
    )
    return [
        f"tensors of the streams: not compared, parscale_adapt {report.made_by} stored nothing to compare them with"
        if count is None
        else f"tensors of the streams: {count - len(changed)} of {count} as in the source"
        + (f", not {names}" if changed else ""),
        *(
            f"logits in {found.dtype}: largest difference {found.largest_difference:.3g} (tolerance "
            f"{found.tolerance:.3g}), same most likely token at {found.num_same_choices} of {found.num_tokens} positions"
            for found in report.comparisons
        ),
    ]
