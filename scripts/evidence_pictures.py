"""The pictures of docs/evidence.md."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from evidence_figures import Results, training_arithmetic
from evidence_training import CURVE_DOCUMENTS
from matplotlib.figure import Figure

from parscale_adapt.analysis.plots import COLOURS, GROUND, MARKERS


STREAMS = (2, 4, 8)
SERIES = {
    "LoRA of the same size as LoRA + streams": {2: "lora14", 4: "lora20", 8: "lora31"},
    "LoRA r=8 + P streams": {2: "lora8+streams2", 4: "lora8+streams4", 8: "lora8+streams8"},
    "LoRA of the same size as P streams": {2: "lora6", 4: "lora12", 8: "lora23"},
    "prefix tuning, P * 48 tokens in one stream": {2: "prefix_tuning96", 4: "prefix_tuning192", 8: "prefix_tuning384"},
    "P streams": {2: "streams2", 4: "streams4", 8: "streams8"},
}


def shown_streams(results: Results) -> list[int]:
    """The P of which all series of the first picture are there."""
    return [count for count in STREAMS if all(results.of(names[count]) for names in SERIES.values())]


def loss_by_streams(results: Results) -> Figure:
    """Held-out loss against P with the baselines of the same number of trained parameters."""
    with matplotlib.rc_context(GROUND):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        counts = shown_streams(results)
        for (label, names), colour, marker in zip(SERIES.items(), COLOURS[1:], MARKERS):
            means = [results.mean(names[count]) for count in counts]
            spreads = [results.spread(names[count]) for count in counts]
            below = [mean - low for mean, (low, _) in zip(means, spreads)]
            above = [high - mean for mean, (_, high) in zip(means, spreads)]
            axes.errorbar(counts, means, (below, above), color=colour, marker=marker, capsize=3, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("P (streams, or the baseline of the same number of trained parameters)")
        axes.set_ylabel("held-out loss, nats per token")
        if results.of("lora8"):
            axes.axhline(results.mean("lora8"), color=COLOURS[0], linestyle="dashed", label="LoRA r=8")
        axes.set_title(f"SmolLM2-135M on unseen Python; the backbone alone has {results.mean('backbone'):.3f}")
        figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    return figure


def gain_and_forgetting(results: Results, labels: dict[str, str]) -> Figure:
    """By how much each way of training lowers the loss on Python and raises that on English."""
    with matplotlib.rc_context(GROUND):
        figure = Figure(figsize=(8.5, 0.32 * len(labels) + 1.4), layout="constrained")
        axes = figure.subplots()
        gains = [results.mean("backbone") - results.mean(name) for name in labels]
        losses = [results.forgetting(name) for name in labels]
        places = range(len(labels))
        axes.barh([place + 0.2 for place in places], gains, 0.38, color=COLOURS[1], label="fall of the loss on Python")
        axes.barh(
            [place - 0.2 for place in places], losses, 0.38, color=COLOURS[3], label="rise of the loss on English"
        )
        axes.set_yticks(list(places), list(labels.values()))
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel("nats per token")
        figure.legend(frameon=False, loc="outside upper center", ncols=2)
    return figure


def loss_by_price(results: Results, labels: dict[str, str]) -> Figure:
    """Held-out loss while training, against tokens and against arithmetic."""
    with matplotlib.rc_context(GROUND):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        by_tokens, by_arithmetic = figure.subplots(1, 2, sharey=True)
        for (name, label), colour, marker in zip(labels.items(), COLOURS[1:], MARKERS):
            tokens, losses = zip(*results.curve(name))
            row = results.of(name)[0]
            arithmetic = [training_arithmetic(row, count) for count in tokens]
            for axes, values in ((by_tokens, tokens), (by_arithmetic, arithmetic)):
                axes.plot(values, losses, color=colour, marker=marker, label=label)
        by_tokens.set_xlabel("tokens trained on")
        by_arithmetic.set_xlabel("floating-point operations")
        by_tokens.set_ylabel(f"loss of the first {CURVE_DOCUMENTS} held-out documents, nats per token")
        for axes in (by_tokens, by_arithmetic):
            axes.set_xscale("log")
        handles, names = by_tokens.get_legend_handles_labels()
        figure.legend(handles, names, frameon=False, fontsize=9, loc="outside upper center", ncols=4)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a picture without a date in it, so that the same figures give the same file."""
    figure.savefig(path, dpi=110, metadata={"Software": None})
