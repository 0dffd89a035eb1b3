"""The picture of an evaluation: one panel for each metric, each model a point with its interval."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .contenders import Contender
from .evaluating import Row


_COLORS = {"backbone": "#000000", "beams": "#D55E00", "streams": "#0072B2"}  # Okabe-Ito
_MAX_COLUMNS = 4
_STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 9}


def draw_scores(rows: Sequence[Row], contenders: Sequence[Contender]) -> Figure:
    """Panels in the order of the rows; contenders have their place and color in all of them."""
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        panels.setdefault((row.measure, row.metric), []).append(row)
    num_columns = min(_MAX_COLUMNS, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    height = 0.28 * len(contenders) + 0.9
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(1.3 + 2.7 * num_columns, height * num_rows + 0.4), layout="constrained")
        grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flatten()
        for axes, same in zip(grid, panels.values()):
            _draw_panel(axes, same, [one.name for one in contenders])
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        figure.supxlabel("score, with its 95% interval over items", fontsize=9)
    return figure


def _draw_panel(axes: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    for row in rows:
        place, value, interval = names.index(row.contender.name), row.score.value, row.score.interval
        color = _COLORS[_kind(row.contender)]
        axes.plot(value, place, "o", color=color, markersize=4)
        if interval is not None:
            axes.plot(interval, [place, place], color=color, linewidth=1.5)
        if place == 0:
            axes.axvline(value, color="#BBBBBB", linewidth=0.8, zorder=0)
    arrow = {True: "", False: ", lower is better", None: ""}[rows[0].score.higher_is_better]
    axes.set_title(f"{rows[0].measure}\n{rows[0].metric.removesuffix(',none')}{arrow}", parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)  # "$" in a name is no formula
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3))
    axes.margins(x=0.15)


def _kind(contender: Contender) -> str:
    if contender.source is not None:
        return "streams"
    return "beams" if contender.num_beams > 1 else "backbone"


def save(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    figure.savefig(path, format="png", dpi=130)
