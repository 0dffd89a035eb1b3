"""`parscale fit-law`: fit a scaling law to training runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..analysis.sizes import size_text
from ..files import write_atomically
from .law_source import use_one_blas_thread
from .output import check_writable, print_table, write_json


if TYPE_CHECKING:
    from ..analysis.fit import Fit


def fit_law(
    runs: Annotated[
        str,
        typer.Argument(
            help="CSV file (columns num_params, num_streams, loss), folder with metrics.json files, "
            "or stack-v2-python or pile for the paper's points."
        ),
    ],
    form: Annotated[str, typer.Option(help="log (equation 5) or diversity (proposition 1).")] = "log",
    dataset: Annotated[str | None, typer.Option(help="Which rows of a CSV file with a column `dataset`.")] = None,
    bootstrap: Annotated[int, typer.Option(help="Bootstrap fits for the intervals; 0 for none.", min=0)] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.", min=0)] = 0,
    show_points: Annotated[bool, typer.Option("--show-points", help="Also print every run's residual.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (PNG).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON.")] = None,
) -> None:
    """Fit the paper's scaling law to training runs, with bootstrap intervals."""
    check_writable(json_file, pictures=[plot])
    use_one_blas_thread()
    from ..analysis import fit as fitting
    from ..analysis.runs import read_runs

    fit = fitting.fit_law(read_runs(runs, dataset), form, num_bootstrap=bootstrap, seed=seed)
    _print_parameters(fit)
    if show_points:
        _print_points(fit)
    write_json(json_file, fit_as_dict(fit))
    if plot is not None:
        from ..analysis import plots

        figure = plots.plot_fit(fit, Path(runs).stem)
        write_atomically(plot, lambda path: plots.save(figure, path))


def fit_as_dict(fit: "Fit") -> dict[str, object]:
    """The figures of a fit, for JSON; `law_from_dict` reads the law back."""
    return {
        **fit.law.as_dict(),
        "r2": fit.r2,
        "num_runs": len(fit.runs),
        "intervals": {name: list(interval) for name, interval in fit.intervals.items()},
        "confidence": fit.confidence,
        "bootstrap": {"kind": "residual", "num_fits": fit.num_bootstrap, "seed": fit.seed},
        "undetermined": list(fit.undetermined),
        "points": [
            {
                "num_params": run.num_params,
                "num_streams": run.num_streams,
                "loss": run.loss,
                "predicted": float(predicted),
                "residual": float(residual),
            }
            for run, predicted, residual in zip(fit.runs, fit.predicted, fit.residuals)
        ],
    }


def _print_parameters(fit: "Fit") -> None:
    rows = []
    for name, value in fit.law.as_dict().items():
        if isinstance(value, float):
            interval = fit.intervals.get(name)
            rows.append([name, f"{value:.5g}", "{:.4g} to {:.4g}".format(*interval) if interval else "-"])
    print_table(
        f"Scaling law, {fit.law.form} form, {len(fit.runs)} runs: R² = {fit.r2:.4f}",
        ["parameter", "value", f"{fit.confidence:.0%} interval"],
        rows,
    )
    worst = int(abs(fit.residuals).argmax())
    run = fit.runs[worst]
    print(
        f"Largest residual: {fit.residuals[worst]:+.4f} nats per token "
        f"(N = {size_text(run.num_params)}, P = {run.num_streams})."
    )
    if fit.undetermined:
        print(f"These runs do not determine {', '.join(fit.undetermined)}: the fit ended on the edge of its range.")


def _print_points(fit: "Fit") -> None:
    rows = [
        [
            size_text(run.num_params),
            str(run.num_streams),
            f"{run.loss:.4f}",
            f"{float(predicted):.4f}",
            f"{float(residual):+.4f}",
        ]
        for run, predicted, residual in zip(fit.runs, fit.predicted, fit.residuals)
    ]
    print_table("Runs", ["parameters", "streams", "loss", "predicted", "residual"], rows)
