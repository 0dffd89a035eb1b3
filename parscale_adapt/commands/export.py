"""`parscale export`: an adapter and its backbone to one checkpoint."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..analysis.sizes import size_text
from .output import check_writable, hide_progress_bars, write_json


def export(
    adapter: Annotated[str, typer.Argument(help="ParScale adapter: a folder, or a repository on the hub.")],
    output: Annotated[Path, typer.Option(help="Folder of the checkpoint; new or empty.")],
    backbone: Annotated[
        str | None, typer.Option(help="Backbone (default: the one that the adapter's config names).")
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="standalone: any architecture, loads with trust_remote_code and without this package; published: the "
            "authors' layout of Qwen2."
        ),
    ] = "standalone",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (default: as in the backbone).")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of one file of weights.")] = "5GB",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
) -> None:
    """Merge a ParScale adapter, its shared LoRA and its backbone into one self-contained checkpoint."""
    check_writable(json_file)
    hide_progress_bars()
    from ..checkpoints.exporting import export_adapter

    report = export_adapter(adapter, output, backbone, format, dtype, max_shard_size)
    print(
        f"{output}: {report.format} checkpoint of {report.num_streams} streams, "
        f"{size_text(report.num_parameters)} parameters in {report.dtype}; check it with `parscale verify {output}`"
    )
    write_json(json_file, asdict(report))
