"""The two-stage recipe in miniature, start to finish without network: `make demo`.

    python scripts/demo.py                                  # one seed, about 10 minutes
    python scripts/demo.py --seeds 0 1 2                    # the spread over seeds, as in docs/demo.md
    python scripts/demo.py --variants P4_full --starts normal tokens reparameterized

Stage 1 pretrains a small Qwen2 on the Python standard library's source. Stage 2 trains it further on the same tokens
with one stream and with four, full and frozen, each through `recipes/cpt.py`. Prints the held-out losses as measured
and draws the curves.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table


matplotlib.use("Agg")
from matplotlib import pyplot


ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "recipes" / "configs" / "cpt"
VARIANTS = {
    "P1_full": ("P=1, full", "demo.yaml", ["--num_streams", "1"]),
    "P4_full": ("P=4, full", "demo.yaml", []),
    "P4_frozen": ("P=4, frozen", "demo_frozen.yaml", []),
}


def run_variant(folder: Path, variant: str, seed: int, start: str | None) -> dict:
    """Train one variant unless its metrics are there already; return them."""
    name = "_".join([variant, *([start] if start else []), f"seed{seed}"])
    output = folder / name
    if not (output / "metrics.json").is_file():
        _, config, options = VARIANTS[variant]
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        command = [
            *launcher,
            "--config_file",
            str(ROOT / "accelerate_configs" / "cpu.yaml"),
            str(ROOT / "recipes" / "cpt.py"),
            *("--config", str(CONFIGS / config), "--output_dir", str(output), "--seed", str(seed)),
            *("--embedded_dir", str(folder)),
            *options,
            *(["--init_weights", start] if start else []),
        ]
        print(f"\n=== {name}: {' '.join(command[len(launcher) :])}", flush=True)
        # Under this configuration accelerate takes all cores, whose threads wait for each other where anything else runs.
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        environment = {
            **os.environ,
            **threads,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        }
        subprocess.run(command, check=True, env=environment)
    return json.loads((output / "metrics.json").read_text())


def loss_before(folder: Path) -> float:
    """Held-out loss of the backbone that stage 1 made."""
    (record,) = folder.glob("backbone-*/embedded.json")
    return json.loads(record.read_text())["heldout_loss"]


def summary_table(before: float, runs: dict[str, list[dict]]) -> Table:
    num_seeds = max(len(metrics) for metrics in runs.values())
    spread = f" (mean, lowest to highest of {num_seeds} seeds)" if num_seeds > 1 else ""
    table = Table(title=f"Held-out loss in nats per token{spread}")
    for column in ("what", "learned parameters", "tokens", "held-out loss", "against the backbone"):
        table.add_column(column, justify="left" if column == "what" else "right")
    table.add_row("backbone before (stage 1)", "", "", f"{before:.4f}", "")
    for label, metrics in runs.items():
        losses = [run["heldout_loss"] for run in metrics]
        mean = statistics.mean(losses)
        shown = f"{mean:.4f}" + (f" ({min(losses):.4f} to {max(losses):.4f})" if len(losses) > 1 else "")
        table.add_row(
            f"+ {label}",
            f"{metrics[0]['num_trained_params']:,}",
            f"{metrics[0]['num_tokens']:,}",
            shown,
            f"{mean - before:+.4f}",
        )
    return table


def plot_curves(before: float, runs: dict[str, list[dict]], path: Path) -> None:
    """Held-out loss against tokens of stage 2, one line per variant (first seed)."""
    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    axes.axhline(before, color="#999999", linestyle="--", linewidth=1)
    axes.text(
        0.99,
        before,
        "backbone before",
        transform=axes.get_yaxis_transform(),
        color="#777777",
        ha="right",
        va="bottom",
        fontsize="small",
    )
    palette = ["#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7"]
    for color, (label, metrics) in zip(palette, runs.items()):
        points = [entry for entry in metrics[0]["log_history"] if "eval_loss" in entry]
        tokens = [entry["num_input_tokens_seen"] / 1e6 for entry in points]
        losses = [entry["eval_loss"] for entry in points]
        axes.plot(tokens, losses, color=color, marker="o", markersize=3)
        final = metrics[0]["heldout_loss"]  # over all tokens, as in the table; the points are means over batches
        axes.annotate(f" {label}: {final:.3f}", (tokens[-1], losses[-1]), color=color, va="center", fontsize="small")
    axes.set_xlabel("tokens of stage 2 (millions)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.margins(x=0.02)
    axes.set_xlim(right=axes.get_xlim()[1] * 1.22)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--starts", nargs="+", default=[None], help="Starts of the prefixes to compare.")
    args = parser.parse_args()

    runs = {}
    for variant in args.variants:
        for start in args.starts:
            label = VARIANTS[variant][0] + (f", {start}" if start else "")
            runs[label] = [run_variant(args.folder, variant, seed, start) for seed in args.seeds]
    before = loss_before(args.folder)
    picture = args.folder / "heldout_loss.png"
    plot_curves(before, runs, picture)
    console = Console()
    console.print()
    console.print(summary_table(before, runs))
    console.print(f"Curves: {picture}")


if __name__ == "__main__":
    main()
