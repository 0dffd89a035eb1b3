"""The section of docs/evidence.md about the law of our own small runs, from docs/evidence/law_lab.csv."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from evidence_rows import FINISHED
from evidence_text import markdown_table
from law_lab import SIZES, STREAMS
from matplotlib.figure import Figure

from parscale_adapt.analysis.fit import Fit, fit_law
from parscale_adapt.analysis.plots import plot_fit
from parscale_adapt.analysis.runs import read_runs


GOOD_R2 = 0.98  # the paper's own fits have 0.9978 and 0.9987


def fits(table: Path) -> dict[str, Fit]:
    """Both forms of the law, fitted to the lab's runs."""
    return {form: fit_law(read_runs(str(table)), form) for form in ("log", "diversity")}


def picture(fit: Fit) -> Figure:
    """Loss against size for each P, and lines of equal loss."""
    return plot_fit(fit, "own runs")


def section(rows: Sequence[dict[str, str]], fitted: dict[str, Fit]) -> str:
    """The section in Markdown."""
    first = rows[0]
    measured = [float(row["rho"]) for row in rows if row["rho"]]
    log, diversity = fitted["log"], fitted["diversity"]
    return f"""
## The law in the small

{len(SIZES)} sizes of a Llama, each trained from scratch with P = {", ".join(map(str, STREAMS))} on the same
{int(first["tokens"]):,} tokens of Python source ([scripts/law_lab.py](../scripts/law_lab.py), {first["machine"]}; seconds
are of a machine that had other work too). N counts all parameters but the embeddings, prefixes and aggregator included.

{_runs_table(rows)}

`parscale fit-law docs/evidence/law_lab.csv`, with 95% intervals from a residual bootstrap:

{_parameters_table(fitted)}

![fitted law](images/evidence_law.png)

{_verdict(log)} {_gain(rows, log)} Correlation of the streams' errors as `parscale diagnose` measures it (an upper bound, with E
taken as 0): {statistics.mean(measured):.4f} on average, {min(measured):.4f} to {max(measured):.4f}; as the diversity form
fits it: {diversity.law.as_dict()["rho"]:.4f}.
"""


def _gain(rows: Sequence[dict[str, str]], log: Fit) -> str:
    k = log.law.as_dict()["k"]
    paper = "(the paper's is 0.39 on code and 0.33 on text)"
    if k > 0:
        return f"The streams' gain of equation 5 is k = {k:.2f} {paper}."
    losses = {(row["size"], int(row["num_streams"])): float(row["loss"]) for row in rows if row["status"] == FINISHED}
    changes = {
        count: [losses[size, count] - losses[size, 1] for size in SIZES if (size, count) in losses]
        for count in STREAMS[1:]
    }
    told = "; ".join(
        f"P={count}: {', '.join(f'{change:+.3f}' for change in of_sizes)}" for count, of_sizes in changes.items()
    )
    tokens, sizes = int(rows[0]["tokens"]), [int(row["backbone_params"]) for row in rows]
    return (
        f"**They don't show that P helps**: the streams' gain k of equation 5 {paper} ends on the edge of its range at {k:.2f}. "
        f"Against one stream of the same backbone the loss changes by these nats, smallest size first: {told}. Each "
        "is one run, and how far a seed alone moves it was not measured. How little the streams came apart is told by the "
        "correlation below, with "
        f"{tokens / max(sizes):.0f} to {tokens / min(sizes):.0f} tokens for each parameter; the paper's smallest models have "
        "half a billion parameters and read 42 billion."
    )


def _runs_table(rows: Sequence[dict[str, str]]) -> str:
    losses = {(row["size"], row["num_streams"]): row for row in rows if row["status"] == FINISHED}
    lines = []
    for size in SIZES:
        cells = [losses.get((size, str(count))) for count in STREAMS]
        lines.append([size, *(f"{float(cell['loss']):.4f}" if cell else "" for cell in cells)])
    return markdown_table(("backbone", *(f"P={count}" for count in STREAMS)), lines)


def _parameters_table(fitted: dict[str, Fit]) -> str:
    lines = []
    for form, fit in fitted.items():
        for name, value in fit.law.as_dict().items():
            if isinstance(value, float):
                low, high = fit.intervals[name]
                edge = "; on the edge of its range" if name in fit.undetermined else ""
                lines.append([form, name, f"{value:.4g}", f"{low:.4g} to {high:.4g}{edge}"])
        lines.append([form, "R2", f"{fit.r2:.4f}", ""])
    return markdown_table(("form", "", "value", "interval"), lines)


def _verdict(log: Fit) -> str:
    if log.r2 >= GOOD_R2:
        return f"The log form explains {100 * log.r2:.1f}% of the variance of these losses."
    return (
        f"The log form explains only {100 * log.r2:.1f}% of the variance of these losses: models as small as these are "
        "far from the end of their training, which the law has no term for."
    )
