"""`parscale predict`: what a scaling law says about a size and a number of streams."""

import math
from pathlib import Path
from typing import Annotated

import typer

from ..analysis.sizes import size_text
from .law_source import LawOption, use_one_blas_thread
from .output import check_writable, print_table, write_json


def predict(
    num_params: Annotated[
        float | None, typer.Option(help="Non-embedding parameters of backbone and adapter, such as 1.6e9.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Instead: config.json, its folder, or a size of the paper (1.6B).")
    ] = None,
    num_streams: Annotated[
        list[int] | None, typer.Option(help="P; repeat for several (default 1, 2, 4, 8).", min=1)
    ] = None,
    match_params: Annotated[
        float | None, typer.Option(help="Also: how many streams match a one-stream model of this size.")
    ] = None,
    law: LawOption = "stack-v2-python",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON.")] = None,
) -> None:
    """Predict losses, equivalent parameters, and the number of streams that matches a larger model."""
    check_writable(json_file)
    use_one_blas_thread()
    if (num_params is None) == (model is None):
        raise typer.BadParameter("give either --num-params or --model")
    from ..analysis.law_source import load_law
    from ..analysis.reports import prediction

    fitted = load_law(law)
    streams = sorted(set(num_streams or [1, 2, 4, 8]))
    sizes = _sizes(num_params, model, streams)
    rows = [prediction(fitted, size, count) for size, count in zip(sizes, streams)]
    values: dict[str, object] = {"law": fitted.as_dict(), "rows": rows}
    print_table(
        f"Predictions of the law fitted to {law} ({fitted.form} form)",
        ["streams", "parameters", "loss (nats per token)", "equivalent parameters", "gain"],
        [
            [
                f"{row['num_streams']}",
                size_text(row["num_params"]),
                f"{row['loss']:.4f}",
                size_text(row["equivalent_params"]),
                f"{row['gain']:.2f}x",
            ]
            for row in rows
        ],
    )
    if match_params is not None:
        # Here the small share of the adapter's own parameters, which grows with P, is left out.
        needed = fitted.streams_to_match(_sizes(num_params, model, [1])[0], match_params)
        values["match"] = {"target_params": match_params, "num_streams": needed, "whole_streams": math.ceil(needed)}
        print(f"To match {size_text(match_params)} parameters: P = {needed:.2f}, so {math.ceil(needed)} streams.")
    write_json(json_file, values)


def _sizes(num_params: float | None, model: str | None, streams: list[int]) -> list[float]:
    """Parameters for each number of streams: of a backbone with its adapter, or the given number as it is."""
    if model is None:
        return [num_params or 0.0] * len(streams)
    from ..analysis.backbone_shape import load_shape

    shape = load_shape(model)
    return [shape.params_with_streams(count) for count in streams]
