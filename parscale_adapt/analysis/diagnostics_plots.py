"""One page of pictures of a [`StreamDiagnostics`]. Okabe-Ito colours, which colour-blind readers can tell apart."""

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from .diagnostics import FINAL_STATES, StreamDiagnostics
from .plots import COLOURS, GROUND, LARGER_COLOUR, label_line_ends


_MIXTURE, _STREAM, _PLAIN_MEAN, _SHARE = COLOURS[0], COLOURS[1], COLOURS[3], COLOURS[5]
_MAX_NUMBERED_STREAMS = 8


def plot_diagnostics(found: StreamDiagnostics, title: str) -> Figure:
    """Five panels: weights, own losses, correlation of errors, similarity by layer, loss with fewer streams."""
    with matplotlib.rc_context(GROUND):
        figure = Figure(figsize=(13, 7.6), layout="constrained")
        grid = figure.add_gridspec(2, 6)
        _draw_weights(figure.add_subplot(grid[0, :2]), found)
        _draw_losses(figure.add_subplot(grid[0, 2:4]), found)
        _draw_rho(figure.add_subplot(grid[0, 4:]), found)
        _draw_similarity(figure.add_subplot(grid[1, :3]), found)
        _draw_removal(figure.add_subplot(grid[1, 3:]), found)
        figure.suptitle(f"{title}: {found.num_streams} streams, {found.num_tokens:,} tokens", fontsize=13)
    return figure


def _draw_weights(axes: Axes, found: StreamDiagnostics) -> None:
    streams = range(found.num_streams)
    for values, colour, offset in ((found.mean_weight, _STREAM, -0.2), (found.largest_share, _SHARE, 0.2)):
        axes.bar([stream + offset for stream in streams], values, width=0.38, color=colour)
    top = max(*found.mean_weight, *found.largest_share)
    equal = 1 / found.num_streams
    axes.axhline(equal, color=_MIXTURE, linestyle=":", linewidth=1.5)
    axes.annotate("1 / P", (1, equal), (4, 0), ("axes fraction", "data"), textcoords="offset points", va="center")
    axes.text(0.02, 0.98, "mean weight", transform=axes.transAxes, color=_STREAM, va="top", weight="bold")
    name = "share of tokens where it is the largest"
    axes.text(0.02, 0.91, name, transform=axes.transAxes, color="#8A5F00", va="top", weight="bold")
    axes.set(ylim=(0, 1.3 * top), ylabel="weight, share of tokens", xlabel="stream")
    axes.set_title(f"weights; entropy {found.entropy:.3f} nats ({found.entropy_share:.1%} of log P)")
    _number_streams(axes, found.num_streams)


def _draw_losses(axes: Axes, found: StreamDiagnostics) -> None:
    axes.plot(range(found.num_streams), found.own_loss, "o", color=_STREAM, markersize=9)
    lines = (
        ("learned\nmixture", found.mixture_loss, _MIXTURE, "-"),
        ("plain\nmean", found.plain_mean_loss, _PLAIN_MEAN, "--"),
    )
    losses = [*found.own_loss, found.mixture_loss, found.plain_mean_loss]
    margin = 0.15 * (max(losses) - min(losses)) or 0.01
    axes.set(ylim=(min(losses) - margin, max(losses) + margin), xlim=(-0.5, found.num_streams - 0.5))
    for _, loss, colour, style in lines:
        axes.axhline(loss, color=colour, linestyle=style, linewidth=1.8)
    label_line_ends(axes, found.num_streams - 0.5, [(loss, name, colour) for name, loss, colour, _ in lines])
    axes.set(xlabel="stream", ylabel="loss (nats per token)")
    axes.set_title("each stream alone (dots) and mixed (lines)")
    _number_streams(axes, found.num_streams)


def _draw_rho(axes: Axes, found: StreamDiagnostics) -> None:
    off_diagonal = [value for i, row in enumerate(found.pairwise_rho) for j, value in enumerate(row) if i != j]
    low = min(off_diagonal)
    low = min(low, 1 - 1e-6)
    image = axes.imshow(found.pairwise_rho, cmap="cividis", vmin=low, vmax=1)
    if found.num_streams <= _MAX_NUMBERED_STREAMS:
        size = 11 if found.num_streams <= 4 else 8
        num_digits = 4 if low > 0.99 and found.num_streams <= 4 else 3
        for i, row in enumerate(found.pairwise_rho):
            for j, value in enumerate(row):
                colour = "white" if (value - low) / (1 - low) < 0.6 else "black"
                axes.text(j, i, f"{value:.{num_digits}f}", ha="center", va="center", color=colour, fontsize=size)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85)
    bar.set_label(r"$\rho$ of a pair")
    sign, note = ("\\leq", "bound, ") if found.irreducible_loss == 0 else ("=", "")
    bound = rf"$\rho {sign} {found.rho:.4f}$ ({note}E = {found.irreducible_loss:g})"
    axes.set(xlabel="stream", ylabel="stream", title=f"residual errors: {bound}")
    axes.spines[:].set_visible(False)
    _number_streams(axes, found.num_streams)
    axes.yaxis.set_major_locator(axes.xaxis.get_major_locator())


def _draw_similarity(axes: Axes, found: StreamDiagnostics) -> None:
    pairs = [[layer.cosine[i][j] for i in range(found.num_streams) for j in range(i)] for layer in found.layers]
    places = range(1, len(found.layers) + 1)
    means = [layer.mean_cosine for layer in found.layers]
    axes.fill_between(places, [min(row) for row in pairs], [max(row) for row in pairs], color=_STREAM, alpha=0.2)
    axes.plot(places, means, "o-", color=_STREAM, linewidth=1.8)
    ends = [(means[-1], "mean of pairs", _STREAM)]
    if found.num_streams > 2:
        ends += [(max(pairs[-1]), "nearest pair", LARGER_COLOUR), (min(pairs[-1]), "farthest pair", LARGER_COLOUR)]
    axes.set(xlabel="layer (last: after the final norm)", ylabel="cosine similarity")
    axes.set_title("hidden states of different streams at the same token")
    label_line_ends(axes, len(found.layers), ends)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    if found.layers[-1].layer == FINAL_STATES and len(found.layers) <= 12:
        axes.set_xticks(list(places), [*(str(place) for place in places[:-1]), FINAL_STATES])


def _draw_removal(axes: Axes, found: StreamDiagnostics) -> None:
    counts = [len(step.streams) for step in found.removal]
    losses = [step.loss for step in found.removal]
    axes.plot(counts, losses, "o-", color=_MIXTURE, linewidth=1.8, markersize=7)
    span = (max(losses) - min(losses)) or 0.01
    for index, (count, step) in enumerate(zip(counts, found.removal)):
        name = "all streams" if step.removed is None else f"{step.removed} off" + (" too" if index > 1 else "")
        if count == 1:
            name = f"only {step.streams[0]}"
        is_last = index == len(losses) - 1
        # To the right of the point, on the side that the line to the next point leaves free.
        is_below = not is_last and losses[index + 1] > step.loss
        place: Any = {"xytext": (0, 9), "ha": "center"} if is_last else {"xytext": (7, -15 if is_below else 8)}
        axes.annotate(name, (count, step.loss), **place, textcoords="offset points", fontsize=10)
    axes.set(ylim=(min(losses) - 0.2 * span, max(losses) + 0.2 * span), xlim=(max(counts) + 0.4, 0.6))
    axes.xaxis.set_major_locator(FixedLocator(_ticks(counts)))
    axes.set(xlabel="streams left", ylabel="loss (nats per token)")
    axes.set_title("streams switched off one by one, smallest mean weight first")


def _number_streams(axes: Axes, num_streams: int) -> None:
    axes.xaxis.set_major_locator(FixedLocator(_ticks(range(num_streams))))


def _ticks(values: Sequence[int]) -> list[float]:
    step = max(1, len(values) // 16)
    return [float(value) for value in list(values)[::step]]
