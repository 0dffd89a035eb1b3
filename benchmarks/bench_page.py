"""The tables and pictures of a run of benchmarks/bench.py, on screen and in a page."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from step_profile import GROUPS, REST

from parscale_adapt.analysis.plots import COLOURS, GROUND, MARKERS


BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
TRAINING = ("training", "P", "step", "checkpointed", "seconds", "of plain", "peak (MiB)", "of plain", "of the limit")
DECODING = (
    "batch",
    "context",
    "cache",
    "P",
    "ms per token",
    "of P = 1",
    "of the limit",
    "prompt (s)",
    "of the limit",
)
PROFILE = ("training", "P", "step", *GROUPS, REST, "all (ms)", "operations")


def training_cells(row: dict) -> list[str]:
    return [
        row["training"],
        str(row["num_streams"]),
        row["kind"],
        "yes" if row["checkpointed"] else "no",
        f"{row['seconds']:.3f} ({row['spread'][0]:.3f} to {row['spread'][1]:.3f})",
        _number(row["time_ratio"]),
        f"{row['peak_mib']:.0f}",
        _number(row["peak_ratio"]),
        f"{row['fraction_of_limit']:.0%}",
    ]


def decoding_cells(row: dict) -> list[str]:
    fraction = row["prefill_fraction_of_limit"]
    return [
        str(row["batch_size"]),
        str(row["context"]),
        row["cache"],
        str(row["num_streams"]),
        f"{row['ms_per_token']:.2f} ({row['spread'][0]:.2f} to {row['spread'][1]:.2f})",
        _number(row["ratio"]),
        f"{row['fraction_of_limit']:.0%}",
        "" if row["prefill_seconds"] is None else f"{row['prefill_seconds']:.3f}",
        "" if fraction is None else f"{fraction:.0%}",
    ]


def profile_cells(row: dict) -> list[str]:
    spent = row["milliseconds"]
    total = sum(spent.values())
    shares = [f"{time:.0f} ({time / total:.0%})" for time in spent.values()]
    return [row["training"], str(row["num_streams"]), row["kind"], *shares, f"{total:.0f}", f"{row['operations']:,}"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def show(figures: dict) -> None:
    """Print what was measured."""
    console = Console()
    console.print(limits_sentence(figures))
    for names, cells, key in (
        (TRAINING, training_cells, "training"),
        (PROFILE, profile_cells, "profile"),
        (DECODING, decoding_cells, "decoding"),
    ):
        table = Table(*names, title=f"{key}, {figures['machine']}")
        for row in figures[key]:
            table.add_row(*cells(row))
        console.print(table)


def limits_sentence(figures: dict) -> str:
    """The rates of the machine, at the start of the run and at its end."""
    before, after = figures["limits"]["before"], figures["limits"]["after"]
    return (
        f"{figures['device']}: matrix products {before['flops'] / 1e9:.0f} and {after['flops'] / 1e9:.0f} GFLOP/s before and "
        f"after, copies {before['bandwidth'] / 1e9:.1f} and {after['bandwidth'] / 1e9:.1f} GB/s read and written."
    )


def write_page(figures: dict, page: Path) -> None:
    """Put the run between the marks of a page, and its pictures beside it.

    Raises:
        ValueError: the page has no such marks.
    """
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"`{page}` must have the lines {BEGIN} and {END} once each, between which a run is written.")
    images = page.parent / "images"
    images.mkdir(exist_ok=True)
    training_picture(figures).savefig(images / "bench_training.png", dpi=120)
    decoding_picture(figures).savefig(images / "bench_decoding.png", dpi=120)
    head, rest = text.split(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{_section(figures)}{END}{rest.split(END)[1]}")


def _section(figures: dict) -> str:
    args = figures["arguments"]
    return f"""
```bash
{figures["command"]}
```

{figures["machine"]}; {figures["minutes"]:.0f} minutes. {limits_sentence(figures)}

Qwen2 of {args["num_layers"]} layers, hidden size {args["hidden_size"]}, vocabulary {args["vocab_size"]:,}. Medians, with the
lowest and highest in brackets. A fraction of the limit is the time that these rates allow for the arithmetic and the
bytes of the shape, over the time measured.

### Training steps

{args["batch_size"]} x {args["seq_len"]} tokens, AdamW. The plain backbone runs P * B rows, and its LM head B rows, as in the
others; ratios are to it under the same checkpointing. Peaks are above weights and optimizer states.

![time and peak of a training step](images/bench_training.png)

{_markdown(TRAINING, [training_cells(row) for row in figures["training"]])}
### Where the time of a step goes

Milliseconds by torch's profiler, of one step that is not checkpointed. What streams add to the backbone's own arithmetic on
P * B rows is what "streams" has more than "plain backbone".

{_markdown(PROFILE, [profile_cells(row) for row in figures["profile"]])}
### Prompts and tokens

![milliseconds per token and the limit](images/bench_decoding.png)

{_markdown(DECODING, [decoding_cells(row) for row in figures["decoding"]])}"""


def _markdown(names: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def training_picture(figures: dict) -> Figure:
    """Ratios of time and peak to the plain backbone against P, checkpointed, frozen and full."""
    with matplotlib.rc_context(GROUND):
        figure = Figure(figsize=(9, 4), layout="constrained")
        figure.suptitle("layers checkpointed, the plain backbone on P * B rows = 1", fontsize=10)
        for axes, name, title in zip(
            figure.subplots(1, 2), ("time_ratio", "peak_ratio"), ("time of a step", "peak of a step")
        ):
            rows = [row for row in figures["training"] if row["checkpointed"] and row[name] is not None]
            labels = dict.fromkeys((row["training"], row["kind"]) for row in rows if row["kind"] != "plain backbone")
            for label, colour, marker in zip(labels, COLOURS[1:], MARKERS):
                points = [(row["num_streams"], row[name]) for row in rows if (row["training"], row["kind"]) == label]
                axes.plot(*zip(*points), color=colour, marker=marker, label=", ".join(label))
            axes.axhline(1, color=COLOURS[0], linewidth=1)
            axes.set_xscale("log", base=2)
            counts = sorted({row["num_streams"] for row in rows})
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.set_xlabel("P")
            axes.set_title(title)
        axes.legend(frameon=False, fontsize=8)
    return figure


def decoding_picture(figures: dict) -> Figure:
    """Milliseconds per token against P at the first batch size, and what the limit allows (dashed)."""
    with matplotlib.rc_context(GROUND):
        figure = Figure(figsize=(9, 4), layout="constrained")
        first = figures["decoding"][0]["batch_size"]
        rows = [row for row in figures["decoding"] if row["batch_size"] == first]
        contexts = sorted({row["context"] for row in rows})
        for axes, context in zip(figure.subplots(1, len(contexts), squeeze=False)[0], contexts):
            shown = [row for row in rows if row["context"] == context]
            for cache, colour, marker in zip(dict.fromkeys(row["cache"] for row in shown), COLOURS[1:], MARKERS):
                points = [row for row in shown if row["cache"] == cache]
                counts = [row["num_streams"] for row in points]
                axes.plot(counts, [row["ms_per_token"] for row in points], color=colour, marker=marker, label=cache)
                bound = [row["fraction_of_limit"] * row["ms_per_token"] for row in points]
            axes.plot(counts, bound, color=COLOURS[0], linestyle="dashed", label="limit")
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.set_xlabel("P")
            axes.set_ylabel("ms per token")
            axes.set_title(f"context {context}, batch {first}")
            axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
    return figure
