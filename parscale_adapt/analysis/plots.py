"""Pictures of the scaling law and of the cost. Okabe-Ito colours, which colour-blind readers can tell apart."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from .comparison import Comparison, compare, mean_cost, square_workloads, widened
from .cost import Cost, CostModel, Workload
from .fit import Fit
from .measured import MeasuredCost
from .runs import as_arrays
from .scaling_law import ScalingLaw, loss_contours


COLOURS = ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
LARGER_COLOUR = "#595959"
Quantity = Callable[[Cost | MeasuredCost], float]
GROUND: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11, "axes.titlesize": 12}


def plot_fit(fit: Fit, title: str) -> Figure:
    """Two panels: loss against parameters for each P with the fitted curves, and loss contours over N and P."""
    with matplotlib.rc_context(GROUND):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        curves, contours = figure.subplots(1, 2)
        _draw_fit_curves(curves, fit)
        _draw_contours(contours, fit)
        figure.suptitle(f"{title}: {describe_law(fit.law)}, R² = {fit.r2:.4f}", fontsize=12)
    return figure


def describe_law(law: ScalingLaw) -> str:
    """The law's form and parameters in one line."""
    values = {name: value for name, value in law.as_dict().items() if isinstance(value, float)}
    return f"{law.form} form, " + ", ".join(
        f"{name} = {value:.3g}" if name == "A" else f"{name} = {value:.3f}" for name, value in values.items()
    )


def plot_cost_by_batch(
    model: CostModel,
    law: ScalingLaw,
    streams: Sequence[int],
    batch_sizes: Sequence[int],
    lengths: Sequence[tuple[int, int]],
    measured: Sequence[MeasuredCost] = (),
) -> Figure:
    """Two panels, memory and latency against batch size: one line for each P, and the larger model of equal loss."""
    larger = widened(model, _comparison(model, law, streams, 1).larger_params)
    lines: list[tuple[str, CostModel, int]] = [(f"P = {count}", model, count) for count in streams]
    lines.append((f"P = 1, {_size_name(larger.shape.num_params, 2)},\nloss of P = {max(streams)}", larger, 1))
    with matplotlib.rc_context(GROUND):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        for axes, (unit, quantity) in zip(figure.subplots(1, 2), _QUANTITIES.items()):
            ends = []
            for index, (name, line_model, count) in enumerate(lines):
                style = _line_style(index, is_larger=line_model is larger)
                values = [
                    quantity(mean_cost(line_model, [Workload(batch, *pair) for pair in lengths], count))
                    for batch in batch_sizes
                ]
                axes.plot(batch_sizes, values, markersize=5, **style)
                ends.append((values[-1], name, style["color"]))
            _draw_measured(axes, measured, quantity, streams)
            _set_log_ticks(axes.xaxis, batch_sizes, [str(batch) for batch in batch_sizes])
            axes.set(xlabel="batch size (rows)", ylabel=_AXIS_LABELS[unit], ylim=(0, None))
            label_line_ends(axes, batch_sizes[-1], ends)
        figure.suptitle(f"{model.shape.name} on {model.device.name}, {_describe_lengths(lengths)}", fontsize=12)
    return figure


def plot_loss_against_cost(
    model: CostModel, law: ScalingLaw, streams: Sequence[int], batch_sizes: Sequence[int]
) -> Figure:
    """The paper's figure 4 for one backbone: loss against memory and latency, a column for each batch size."""
    with matplotlib.rc_context(GROUND):
        figure = Figure(figsize=(3.1 * len(batch_sizes), 6.2), layout="constrained")
        panels = figure.subplots(2, len(batch_sizes), squeeze=False, sharey=True)
        for column, batch in enumerate(batch_sizes):
            for axes, unit in zip(panels[:, column], _QUANTITIES):
                _draw_loss_panel(axes, model, law, streams, batch, unit)
                axes.set_xlabel(_AXIS_LABELS[unit])
            panels[0, column].set_title(f"batch size {batch}")
        for axes in panels[:, 0]:
            axes.set_ylabel("predicted loss (nats per token)")
        figure.suptitle(
            f"{model.shape.name} on {model.device.name}: what a lower loss costs, by streams and by parameters",
            fontsize=12,
        )
    return figure


def save(figure: Figure, path: Path, file_format: str = "png") -> None:
    """Write a figure; the caller sees to it that `path` is a fresh file."""
    figure.savefig(path, format=file_format, dpi=100)


def _memory(cost: Cost | MeasuredCost) -> float:
    return cost.memory_gib


def _latency(cost: Cost | MeasuredCost) -> float:
    return cost.latency_seconds


_QUANTITIES: Mapping[str, Quantity] = {"GiB": _memory, "s": _latency}
_AXIS_LABELS = {"GiB": "memory (GiB)", "s": "latency (s)"}


def _comparison(model: CostModel, law: ScalingLaw, streams: Sequence[int], batch: int) -> Comparison:
    return compare(model, law, square_workloads([batch]), max(streams))


def _draw_fit_curves(axes: Axes, fit: Fit) -> None:
    sizes, streams, losses = as_arrays(fit.runs)
    grid = np.geomspace(sizes.min() / 1.15, sizes.max() * 1.15, 100)
    ends = []
    for index, count in enumerate(sorted(set(streams))):
        style = _line_style(index, is_larger=False)
        curve = fit.law.loss(grid, count)
        chosen = streams == count
        axes.plot(grid, curve, color=style["color"], linewidth=1.5)
        axes.plot(sizes[chosen], losses[chosen], linestyle="none", marker=style["marker"], color=style["color"])
        ends.append((float(curve[-1]), f"P = {count:g}", style["color"]))
    _set_log_ticks(axes.xaxis, *_size_ticks(sizes))
    axes.set(xlabel="non-embedding parameters", ylabel="loss (nats per token)", title="loss and fitted curves")
    label_line_ends(axes, grid[-1], ends)


def _draw_contours(axes: Axes, fit: Fit) -> None:
    sizes, streams, _ = as_arrays(fit.runs)
    top = max(streams.max(), 2.0) * 1.1
    edges = sizes.min() / 1.15, sizes.max() * 1.15
    grid = loss_contours(fit.law, np.geomspace(*edges, 80), np.geomspace(1, top, 80))
    levels = MaxNLocator(14, steps=[1, 2, 5, 10]).tick_values(grid[2].min(), grid[2].max())
    num_digits = max(-math.floor(math.log10(levels[1] - levels[0]) + 1e-9), 0)
    lines = axes.contour(*grid, levels=levels, colors=COLOURS[1], linewidths=1.5)
    height = math.sqrt(top)
    reachable = [float(level) for level in levels if level > fit.law.E]
    places = [(fit.law.params_for_loss(level) / float(fit.law.gain(height)), height) for level in reachable]
    places = [place for place in places if edges[0] * 1.05 < place[0] < edges[1] / 1.05]
    axes.clabel(lines, fontsize=10, fmt=f"%.{num_digits}f", colors="black", inline_spacing=3, manual=places)
    axes.plot(sizes, streams, linestyle="none", marker="o", color=LARGER_COLOUR, markersize=4, clip_on=False)
    axes.set(xscale="log", yscale="log", xlabel="non-embedding parameters", ylabel="streams P")
    axes.set_title("lines of equal loss (nats per token); dots are runs")
    _set_log_ticks(axes.xaxis, *_size_ticks(sizes))
    counts = sorted(set(streams))
    _set_log_ticks(axes.yaxis, counts, [f"{count:g}" for count in counts])


def _draw_measured(
    axes: Axes,
    measured: Sequence[MeasuredCost],
    quantity: Quantity,
    streams: Sequence[int],
) -> None:
    """Measured costs as open markers in the colour of their number of streams."""
    for index, count in enumerate(streams):
        rows = [row for row in measured if row.num_streams == count]
        style = _line_style(index, is_larger=False)
        points = [row.batch_size for row in rows], [quantity(row) for row in rows]
        axes.plot(*points, linestyle="none", marker=style["marker"], markersize=11, mfc="none", mec=style["color"])
    if measured:
        axes.set_title("lines: estimate; open markers: measured")


def _draw_loss_panel(
    axes: Axes, model: CostModel, law: ScalingLaw, streams: Sequence[int], batch: int, unit: str
) -> None:
    comparison = _comparison(model, law, streams, batch)
    workloads, quantity = square_workloads([batch]), _QUANTITIES[unit]
    params = [model.shape.params_with_streams(count, model.num_prefix_tokens) for count in streams]
    losses = [float(law.loss(size, count)) for size, count in zip(params, streams)]
    costs = [quantity(mean_cost(model, workloads, count)) for count in streams]
    axes.plot(costs, losses, color=COLOURS[1], linewidth=1.5)
    sizes = np.geomspace(model.shape.num_params, comparison.larger_params, 30)
    larger_costs = [quantity(mean_cost(widened(model, size), workloads, 1)) for size in sizes]
    axes.plot(larger_costs, law.loss(sizes, 1), color=COLOURS[3], linewidth=2, linestyle="--")
    for index, (cost, loss, count) in enumerate(zip(costs, losses, streams)):
        side = (7, 3, "left") if cost > larger_costs[-1] else (-6, -3, "right")
        axes.plot(cost, loss, marker=MARKERS[index % len(MARKERS)], color=COLOURS[1], markersize=6)
        axes.annotate(f"P = {count}", (cost, loss), side[:2], textcoords="offset points", ha=side[2], fontsize=9)
    end = larger_costs[-1], comparison.equal_loss
    axes.plot(*end, marker="o", color=COLOURS[3], markersize=7)
    name = f"{_size_name(comparison.larger_params, 2)}, P = 1"
    axes.annotate(name, end, (0, -16), textcoords="offset points", ha="center", fontsize=9)
    span = max(*costs, end[0]) - costs[0]
    axes.set_xlim(costs[0] - 0.36 * span, max(*costs, end[0]) + 0.25 * span)
    axes.set_ylim(min(losses) - 0.22 * (max(losses) - min(losses)), None)
    _annotate_increase(axes, unit, comparison, quantity)


def _annotate_increase(axes: Axes, unit: str, comparison: Comparison, quantity: Quantity) -> None:
    """What P streams and the larger model add to the backbone, in the panel's empty corner."""
    names = f"{comparison.num_streams} streams", _size_name(comparison.larger_params, 2)
    costs = comparison.parallel, comparison.larger
    for name, cost, colour, height in zip(names, costs, (COLOURS[1], COLOURS[3]), (0.98, 0.9)):
        text = f"{name}: +{quantity(cost) - quantity(comparison.backbone):.2g} {unit}"
        axes.text(0.99, height, text, transform=axes.transAxes, ha="right", va="top", fontsize=10, color=colour)


def _line_style(index: int, is_larger: bool) -> dict[str, Any]:
    if is_larger:
        return {"color": LARGER_COLOUR, "linestyle": "--", "marker": "x"}
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": "-", "marker": MARKERS[index % len(MARKERS)]}


def label_line_ends(axes: Axes, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names at the right end of lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    ends = sorted(ends)
    heights = [0.06 * (high - low) * (name.count("\n") + 1) for _, name, _ in ends]
    positions: list[float] = []
    for index, (value, _, _) in enumerate(ends):
        gap = (heights[index - 1] + heights[index]) / 2
        positions.append(max(value, positions[-1] + gap) if positions else value)
    # Pushing only upwards would leave every label too high: move the crowded ones back by half of their shift, within the axes.
    crowd = [index for index, (value, _, _) in enumerate(ends) if positions[index] > value]
    shift = 0.0
    if crowd:
        first, last = crowd[0] - 1, crowd[-1]
        shift = min((positions[last] - ends[last][0]) / 2, max(0.0, positions[first] - low - heights[first] / 2))
    for index, (_, name, colour) in enumerate(ends):
        is_crowded = bool(crowd) and crowd[0] - 1 <= index <= crowd[-1]
        axes.annotate(
            name,
            (x, positions[index] - shift * is_crowded),
            (8, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )


def _set_log_ticks(axis: Any, ticks: Sequence[float], labels: Sequence[str]) -> None:
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_ticklabels(labels)


def _size_ticks(sizes: np.ndarray) -> tuple[list[float], list[str]]:
    """About five round sizes inside the range, with names such as 2B or 500M."""
    exponents = range(int(np.floor(np.log10(sizes.min()))), int(np.ceil(np.log10(sizes.max()))) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [
            d * 10.0**e for e in exponents for d in digits if sizes.min() / 1.15 <= d * 10.0**e <= sizes.max() * 1.15
        ]
        if 3 <= len(ticks) <= 6:
            break
    return ticks, [_size_name(tick) for tick in ticks]


def _size_name(size: float, num_digits: int = 3) -> str:
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= scale:
            return f"{size / scale:.{num_digits}g}{unit}"
    return f"{size:.{num_digits}g}"


def _describe_lengths(lengths: Sequence[tuple[int, int]]) -> str:
    pairs = ", ".join(f"{a}" if a == b else f"{a} + {b}" for a, b in lengths)
    return f"input = output length {pairs}" + (" averaged" if len(lengths) > 1 else "")
