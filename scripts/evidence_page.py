"""Write docs/evidence.md and its pictures from the CSV files in docs/evidence.

    python scripts/evidence_page.py

Every number on the page is computed here; tests/scripts/test_evidence_page.py checks that page and tables agree.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import evidence_pictures as pictures
from evidence_figures import ENGLISH, Results, training_arithmetic
from evidence_plan import RANK_OF_LORA_AND_STREAMS, RANK_OF_STREAMS, STREAMS
from evidence_prose import page_text
from evidence_rows import read_rows

from parscale_adapt.analysis.fit import Fit, fit_law
from parscale_adapt.analysis.plots import plot_fit
from parscale_adapt.analysis.runs import read_runs
from parscale_adapt.files import write_text


ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "docs" / "evidence"
PAGE = ROOT / "docs" / "evidence.md"
IMAGES = ROOT / "docs" / "images"
PRICED = {
    "lora8": "LoRA r=8",
    "lora8_4x_tokens": "LoRA r=8, four times the tokens",
    "lora8+streams2": "LoRA r=8 + 2 streams",
    "lora8+streams4": "LoRA r=8 + 4 streams",
    "lora8+streams8": "LoRA r=8 + 8 streams",
    "streams4": "4 streams",
    "full1": "full",
}


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with its first column to the left and all others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def label(name: str) -> str:
    """An experiment in words."""
    words = {"backbone": "backbone, not trained", "full1": "full training, P=1", **PRICED}
    for count in STREAMS:
        words[f"streams{count}"] = f"{count} streams"
        words[f"prefix_tuning{count * 48}"] = f"prefix tuning, {count * 48} tokens, P=1"
        words[f"lora{RANK_OF_STREAMS[count]}"] = f"LoRA r={RANK_OF_STREAMS[count]}"
        words[f"lora{RANK_OF_LORA_AND_STREAMS[count]}"] = f"LoRA r={RANK_OF_LORA_AND_STREAMS[count]}"
        words[f"full{count}"] = f"full training, P={count}"
    for value in ("0", "0.01"):
        words[f"streams4_smoothing_{value}"] = f"4 streams, smoothing {value}"
    words |= {
        "streams4_lora": "4 streams that differ by LoRA",
        "streams4_prefix+lora": "4 streams that differ by prefix and LoRA",
        "streams4_diversity_1": "4 streams, diversity term 1",
        "streams4_diversity_10": "4 streams, diversity term 10",
    }
    if name.startswith("streams4_start_"):
        return f"4 streams, start {name.removeprefix('streams4_start_')}"
    return words.get(name, name)


def matched_table(results: Results, pairs: Sequence[tuple[str, str]]) -> str:
    """Experiments beside the baseline of the same size."""
    rows = []
    for name, other in pairs:
        rows.append(
            [
                label(name),
                _millions(results, name),
                f"{results.mean(name):.4f}",
                label(other),
                _millions(results, other),
                f"{results.mean(other):.4f}",
                str(results.difference(name, other)),
            ]
        )
    header = ("", "trained", "held-out loss", "baseline", "trained", "held-out loss", "difference")
    return markdown_table(header, rows)


def all_rows_table(results: Results) -> str:
    """Every experiment: size, loss before and after, spread, forgetting by kind, what streams do."""
    rows = []
    for name in results.names():
        seeds = results.of(name)
        low, high = results.spread(name)
        entropy = f"{results.mean(name, 'entropy_share'):.2f}" if seeds[0]["entropy_share"] else ""
        rows.append(
            [
                label(name),
                _millions(results, name),
                str(len(seeds)),
                f"{results.mean(name, 'tuning_loss_before') - results.mean('backbone', 'tuning_loss'):+.4f}",
                f"{results.mean(name):.4f}" + (f" ({low:.4f} to {high:.4f})" if len(seeds) > 1 else ""),
                *(f"{results.forgetting(name, kind):+.4f}" for kind in ENGLISH),
                entropy,
            ]
        )
    header = ("", "trained", "seeds", "start", "held-out loss", *ENGLISH, "entropy")
    return markdown_table(header, rows)


def rates_table(results: Results) -> str:
    """What the sweeps measured, and the rate that was taken."""
    families: dict[str, list[tuple[float, float]]] = {}
    for row in results.sweeps:
        _, family, rate = row["name"].split("/")
        loss = float(row["tuning_loss"]) if row["tuning_loss"] else float("inf")
        families.setdefault(family, []).append((float(rate), loss))
    rows = []
    for family, points in families.items():
        taken = min(points, key=lambda point: point[1])[0]
        rows.append(
            [family.replace("_", " "), ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in points), f"{taken:g}"]
        )
    return markdown_table(("", "loss on the tuning documents after 48 steps, by rate", "taken"), rows)


def price_table(results: Results) -> str:
    """Tokens, arithmetic, time and memory of training."""
    rows = []
    plain = training_arithmetic(results.of("lora8")[0], int(results.of("lora8")[0]["tokens"]))
    for name in PRICED:
        row = results.of(name)[0]
        arithmetic = training_arithmetic(row, int(row["tokens"]))
        rows.append([label(name), f"{int(row['tokens']):,}", f"{arithmetic / plain:.1f}", f"{results.mean(name):.4f}"])
    return markdown_table(("", "tokens", "arithmetic of training (LoRA r=8 = 1)", "held-out loss"), rows)


def decode_table(file: Path) -> str:
    """Milliseconds per token and ratio to P=1 by context."""
    measured = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    plain = {
        step["input_len"]: step
        for step in measured["steps"]
        if step["num_streams"] == 1 and step["cache"] == "dynamic"
    }
    for step in measured["steps"]:
        if step["cache"] == "dynamic":
            ratio = step["ms_per_token"] / plain[step["input_len"]]["ms_per_token"]
            rows.append(
                [str(step["num_streams"]), str(step["input_len"]), f"{step['ms_per_token']:.1f}", f"{ratio:.2f}"]
            )
    return markdown_table(("P", "context", "ms per token", "ratio to P=1"), rows)


def law_table(fits: Sequence[Fit]) -> str:
    """Parameters with intervals."""
    rows = []
    for fit in fits:
        for name, value in fit.law.as_dict().items():
            if isinstance(value, float):
                interval = fit.intervals.get(name)
                rows.append(
                    [
                        f"{fit.law.form}: {name}",
                        f"{value:.4g}",
                        "{:.4g} to {:.4g}".format(*interval) if interval else "-",
                        f"{fit.r2:.4f}",
                    ]
                )
    return markdown_table(("", "value", "95% interval", "R²"), rows)


def _millions(results: Results, name: str) -> str:
    return f"{results.mean(name, 'trained_params') / 1e6:.2f}M"


def write_pictures(results: Results, law: Fit, folder: Path) -> None:
    """The page's four pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures.save(pictures.loss_by_streams(results), folder / "evidence_loss_by_streams.png")
    shown = {name: label(name) for name in results.names() if name != "backbone"}
    pictures.save(pictures.gain_and_forgetting(results, shown), folder / "evidence_forgetting.png")
    pictures.save(pictures.loss_by_price(results, PRICED), folder / "evidence_price.png")
    pictures.save(plot_fit(law, "tiny models on Python source"), folder / "evidence_law.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    results, fits = read_all()
    write_text(PAGE, page_text(results, fits))
    write_pictures(results, fits[0], IMAGES)
    print(f"{PAGE} and four pictures are written")


def read_all() -> tuple[Results, list[Fit]]:
    """The rows of the committed tables, and both forms of the law fitted to the lab's."""
    runs = read_runs(TABLES / "law_lab.csv")
    return Results(read_rows(TABLES / "smollm2.csv")), [fit_law(runs, form) for form in ("log", "diversity")]


if __name__ == "__main__":
    main()
