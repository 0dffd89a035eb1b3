"""`parscale import`: a checkpoint in the authors' published layout to a PEFT adapter."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import check_writable, hide_progress_bars, write_json


if TYPE_CHECKING:
    from ..checkpoints.importing import BackboneComparison


def import_checkpoint(
    source: Annotated[str, typer.Argument(help="Published checkpoint: a folder, or a repository on the hub.")],
    output: Annotated[Path, typer.Option(help="Folder of the adapter; new or empty.")],
    backbone: Annotated[
        str | None, typer.Option(help="The plain Qwen2 that the adapter shall run on: a folder or a hub repository.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference of backbone weights that still count as equal.", min=0)
    ] = 0.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
) -> None:
    """Turn a published ParScale checkpoint into a PEFT adapter.

    Without --backbone, or if the backbone in the checkpoint differs from it, the adapter carries the checkpoint's own
    backbone; otherwise it is small and shares the backbone with other adapters.
    """
    check_writable(json_file)
    hide_progress_bars()
    from ..checkpoints.importing import import_published

    report = import_published(source, output, backbone, tolerance)
    if report.comparison is not None:
        print(_compared(report.comparison, str(backbone)))
    carried = "with the checkpoint's own backbone" if report.carries_backbone else f"for the backbone {backbone}"
    print(f"{output}: an adapter of {report.num_streams} streams, {report.num_tensors} tensors, {carried}")
    write_json(json_file, asdict(report))


def _compared(comparison: "BackboneComparison", backbone: str) -> str:
    text = f"backbone: {comparison.num_identical} of {comparison.num_tensors} tensors equal those of {backbone}"
    if comparison.num_identical < comparison.num_tensors:
        text += f", the largest difference is {comparison.largest_difference:.3g}"
    if comparison.different:
        text += f"; {len(comparison.different)} are farther apart than the tolerance, first {comparison.different[0]}"
    return text
