"""`parscale inspect`: what an adapter or a checkpoint is."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..checkpoints.folders import transform_names
from .output import check_writable, write_json


if TYPE_CHECKING:
    from ..checkpoints.inspection import Inspection


def inspect(
    source: Annotated[str, typer.Argument(help="Adapter or checkpoint: a folder, or a repository on the hub.")],
    backbone: Annotated[
        str | None,
        typer.Option(help="Backbone of an adapter, to count its parameters (default: as the adapter says)."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON.")] = None,
) -> None:
    """Show kind, backbone, streams, added parameters, fingerprint and version of an adapter or checkpoint."""
    check_writable(json_file)
    from huggingface_hub.utils import disable_progress_bars

    from ..checkpoints.inspection import inspect_folder

    disable_progress_bars()

    found = inspect_folder(source, backbone)
    for name, value in _rows(found).items():
        print(f"{name:<27} {value}")
    percents = {"added_percent": found.added_percent, "added_percent_per_stream": found.added_percent_per_stream}
    write_json(json_file, {**asdict(found), **percents})


def _rows(found: "Inspection") -> dict[str, str]:
    rows = {
        "kind": found.kind,
        "backbone": (found.backbone or "not named") + (", carried along" if found.carries_backbone else ""),
        "streams (P)": str(found.num_streams),
        "streams differ by": " and ".join(transform_names(found.stream_transform)),
        "prefix tokens": str(found.num_prefix_tokens),
        "aggregator": found.aggregator,
        "added parameters": f"{found.added_parameters:,}",
        "in percent of the backbone": "unknown, give --backbone",
        "in percent, per stream": "unknown, give --backbone",
        "shared LoRA parameters": f"{found.shared_lora_parameters:,}",
        "made by": f"parscale_adapt {found.made_by}" if found.made_by else "unknown",
    }
    if found.added_percent is not None and found.added_percent_per_stream is not None:
        rows["in percent of the backbone"] = f"{found.added_percent:.3f}% of {found.backbone_parameters:,}"
        rows["in percent, per stream"] = f"{found.added_percent_per_stream:.3f}%"
    for name, value in (found.fingerprint or {"of the backbone": "none"}).items():
        rows[f"fingerprint {name}"] = value
    return rows
