"""The picture of a run."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot_curve(log_history: list[dict[str, Any]], path: Path, key: str, label: str) -> None:
    """A figure of the training log, and the streams' mean weights where there are several, against tokens; a PNG.

    Args:
        log_history: what a trainer logged.
        path: the file to write.
        key: the figure's name in the log.
        label: what it is, and its unit.
    """
    points = [entry for entry in log_history if key in entry and "loss" in entry]
    tokens = [entry["num_tokens"] / 1e6 for entry in points]
    weights = sorted({key for entry in points for key in entry if key.startswith("stream_weight/")})
    figure = Figure(figsize=(7, 6 if weights else 3.5), layout="constrained")
    axes = figure.subplots(2 if weights else 1, 1, sharex=True, squeeze=False)
    axes[0, 0].plot(tokens, [entry[key] for entry in points], color="#0072B2")
    axes[0, 0].set_ylabel(label)
    axes[-1, 0].set_prop_cycle(color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"])
    for key in weights:
        number = key.rpartition("/")[2]
        axes[1, 0].plot(tokens, [entry.get(key) for entry in points], label=f"stream {number}")
    if weights:
        axes[1, 0].set_ylabel("mean aggregator weight")
        axes[1, 0].set_ylim(0, 1)
        axes[1, 0].legend(ncols=4, frameon=False, fontsize="small")
    axes[-1, 0].set_xlabel("tokens seen (millions)")
    for axis in axes[:, 0]:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=120)
