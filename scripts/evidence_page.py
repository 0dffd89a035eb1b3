"""Write docs/evidence.md and its pictures from the tables in docs/evidence/.

    python scripts/evidence_page.py

Every number on the page is computed here; tests/scripts/test_evidence_page.py checks that page and table agree. Sections
whose rows have not been run are left out, and the page says which these are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import evidence_hybrid as hybrid
import evidence_law as law
import evidence_pictures as pictures
import evidence_prose as prose
import evidence_readme as readme
from evidence_figures import ENGLISH, Decoding, Results, training_arithmetic
from evidence_plan import (
    DIVERSITY_WEIGHTS,
    RANK_OF_LORA_AND_STREAMS,
    RANK_OF_STREAMS,
    STARTS,
    STREAMS,
    SWEEP_STEPS,
    experiments,
)
from evidence_rows import read_rows
from evidence_text import markdown_table
from hybrid_states import COLUMNS as HYBRID_COLUMNS
from law_lab import COLUMNS as LAW_COLUMNS

from parscale_adapt.files import write_text


Row = dict[str, str]
ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "docs" / "evidence"
PAGE = ROOT / "docs" / "evidence.md"
README = ROOT / "README.md"
IMAGES = ROOT / "docs" / "images"
PRICED = {
    "lora8": "LoRA r=8",
    "lora8_4x_tokens": "LoRA r=8, four times the tokens",
    "lora8+streams2": "LoRA r=8 + 2 streams",
    "lora8+streams4": "LoRA r=8 + 4 streams",
    "lora8+streams8": "LoRA r=8 + 8 streams",
    "streams4": "4 streams",
    "full1": "all weights trained, P=1",
    "full2": "all weights trained, P=2",
    "full4": "all weights trained, P=4",
}
BESIDE_LORA = [
    pair
    for count in STREAMS
    for pair in (
        (f"lora8+streams{count}", f"lora{RANK_OF_LORA_AND_STREAMS[count]}"),
        (f"lora8+streams{count}", "lora8"),
        *((f"lora8+streams{count}", f"lora8+prefix_tuning{other * 48}") for other in STREAMS if other <= count),
    )
]
ALONE = [(f"streams{count}", f"lora{RANK_OF_STREAMS[count]}") for count in STREAMS]
WHOLE = [*((f"full{count}", "full1") for count in STREAMS[:2]), ("full4", "lora8+streams4"), ("full1", "lora8")]
VARIED = (
    *(f"start_{start}" for start in STARTS),
    "smoothing_0",
    "smoothing_0.01",
    "lora",
    "prefix+lora",
    *(f"diversity_{weight:g}" for weight in DIVERSITY_WEIGHTS),
)


def label(name: str) -> str:
    """An experiment in words."""
    words = {"backbone": "backbone, not trained", **PRICED}
    for count in STREAMS:
        words[f"streams{count}"] = f"{count} streams"
        words[f"prefix_tuning{count * 48}"] = f"prefix tuning, {count * 48} tokens, P=1"
        words[f"lora8+prefix_tuning{count * 48}"] = f"LoRA r=8 + prefix tuning, {count * 48} tokens, P=1"
        words[f"lora{RANK_OF_STREAMS[count]}"] = f"LoRA r={RANK_OF_STREAMS[count]}"
        words[f"lora{RANK_OF_LORA_AND_STREAMS[count]}"] = f"LoRA r={RANK_OF_LORA_AND_STREAMS[count]}"
        words[f"full{count}"] = f"all weights trained, P={count}"
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
    return words[name]


def matched_table(results: Results, pairs: Sequence[tuple[str, str]]) -> str:
    """Experiments beside the baseline of the same size."""
    rows = [
        [
            label(name),
            _millions(results, name),
            f"{results.mean(name):.4f}",
            label(other),
            _millions(results, other),
            f"{results.mean(other):.4f}",
            str(results.difference(name, other)),
        ]
        for name, other in pairs
    ]
    header = ("", "trained", "held-out loss", "baseline", "trained", "held-out loss", "difference")
    return markdown_table(header, rows)


def all_rows_table(results: Results) -> str:
    """Every experiment: size, start, loss, spread, forgetting by kind, and how evenly streams weigh."""
    rows = []
    for name in results.names():
        seeds = results.of(name)
        low, high = results.spread(name)
        entropy = f"{results.mean(name, 'entropy_share'):.2f}" if seeds[0]["entropy_share"] else ""
        rows.append(
            [
                label(name),
                f"`{name}`",
                _millions(results, name),
                str(len(seeds)),
                f"{results.mean(name, 'tuning_loss_before') - results.mean('backbone', 'tuning_loss'):+.4f}",
                f"{results.mean(name):.4f}" + (f" ({low:.4f} to {high:.4f})" if len(seeds) > 1 else ""),
                *(f"{results.forgetting(name, kind):+.4f}" for kind in ENGLISH),
                entropy,
            ]
        )
    return markdown_table(("", "name", "trained", "seeds", "start", "held-out loss", *ENGLISH, "entropy"), rows)


def rates_table(results: Results) -> str:
    """What the sweeps measured, and the rate that was taken."""
    rows = []
    for family, points in results.sweep_losses().items():
        taken = min(points, key=lambda rate: points[rate])
        losses = ", ".join(f"{rate:g}: {f'{loss:.4f}' if loss < 99 else 'diverged'}" for rate, loss in points.items())
        rows.append([family.replace("_", " "), losses, f"{taken:g}"])
    return markdown_table(("", "loss by rate", "taken"), rows)


def price_table(results: Results, names: Sequence[str]) -> str:
    """Tokens and arithmetic of training."""
    plain = results.of("lora8")[0]
    unit = training_arithmetic(plain, int(plain["tokens"]))
    rows = []
    for name in names:
        row = results.of(name)[0]
        share = training_arithmetic(row, int(row["tokens"])) / unit
        rows.append([label(name), f"{int(row['tokens']):,}", f"{share:.1f}", f"{results.mean(name):.4f}"])
    return markdown_table(("", "tokens", "arithmetic (LoRA r=8 = 1)", "held-out loss"), rows)


def decoding_table(decoding: Decoding) -> str:
    """Measured time and memory of decoding, by P."""
    rows = [
        [
            "backbone" if count == 1 else f"{count} streams",
            *(
                f"{decoding.milliseconds(count, context):.0f} ({decoding.ratio(count, context):.2f})"
                for context in decoding.contexts
            ),
            *(f"{decoding.memory_gib(count, context):.2f} GiB" for context in decoding.contexts),
        ]
        for count in decoding.streams
    ]
    contexts = [f"{context:,}" for context in decoding.contexts]
    header = ("", *(f"ms at {context}" for context in contexts), *(f"memory at {context}" for context in contexts))
    return markdown_table(header, rows)


def _millions(results: Results, name: str) -> str:
    return f"{results.mean(name, 'trained_params') / 1e6:.2f}M"


@dataclass(frozen=True)
class Tables:
    """What the page is made of. Of the law lab, of the hybrid and of decoding there may be nothing.

    Attributes:
        runs, sweeps, lab, hybrid: rows.
        decoding: what `benchmarks/decode.py --json` wrote.
        folder: where the law lab's table lies, which the fit reads.
    """

    runs: list[Row]
    sweeps: list[Row]
    lab: list[Row] = field(default_factory=list)
    hybrid: list[Row] = field(default_factory=list)
    decoding: Decoding | None = None
    folder: Path = TABLES

    @classmethod
    def read(cls, folder: Path) -> Tables:
        """From the files of a folder."""
        decoding = folder / "decode.json"
        return cls(
            read_rows(folder / "runs.csv"),
            read_rows(folder / "sweeps.csv"),
            _rows_if_any(folder / "law_lab.csv", LAW_COLUMNS),
            _rows_if_any(folder / "hybrid.csv", HYBRID_COLUMNS),
            Decoding(json.loads(decoding.read_text(encoding="utf-8"))) if decoding.is_file() else None,
            folder,
        )


def _rows_if_any(file: Path, columns: Sequence[str]) -> list[Row]:
    return read_rows(file, columns) if file.is_file() else []


def page_text(tables: Tables) -> str:
    """The page in Markdown."""
    results = Results(tables.runs, tables.sweeps)
    planned = list(dict.fromkeys(run.name for run, _ in experiments(tables.sweeps, num_seeds=1)))
    against_prefixes = [(f"streams{count}", f"prefix_tuning{count * 48}") for count in STREAMS]
    parts = [prose.TITLE, prose.answer(results)]
    parts += _section(results, prose.BESIDE_LORA, BESIDE_LORA)
    parts += _section(results, prose.ALONE, ALONE + against_prefixes)
    parts += _section(results, prose.WHOLE, WHOLE)
    if pictures.shown_streams(results):
        parts.append("![loss by P, with baselines of the same size](images/evidence_loss_by_streams.png)")
    priced = [name for name in PRICED if results.of(name) and results.of("lora8")]
    if priced:
        parts += [prose.PRICE, price_table(results, priced), "![loss against price](images/evidence_price.png)"]
    if tables.decoding is not None:
        machine, command = tables.decoding.machine, tables.decoding.command
        parts += [prose.DECODING.format(command=command, machine=machine), decoding_table(tables.decoding)]
    parts += _section(results, prose.VARIED, [(f"streams4_{varied}", "streams4") for varied in VARIED])
    parts += [prose.hints(results), prose.RATES.format(steps=SWEEP_STEPS), rates_table(results)]
    if tables.lab:
        parts.append(law.section(tables.lab, law.fits(tables.folder / "law_lab.csv")))
    if tables.hybrid:
        parts.append(hybrid.section(tables.hybrid))
    if len(results.names()) > 1:
        parts += [prose.ALL_ROWS, all_rows_table(results), "![gained and forgotten](images/evidence_forgetting.png)"]
    parts += [prose.setup(results), prose.not_run(results, planned)]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def readme_section(results: Results) -> str:
    """What the README shows of the runs."""
    return readme.section(results, ALONE + BESIDE_LORA, {name: label(name) for name in results.names()})


def _section(results: Results, text: str, pairs: list[tuple[str, str]]) -> list[str]:
    there = [pair for pair in pairs if all(results.of(name) for name in pair)]
    return [text, matched_table(results, there)] if there else []


def write_pictures(results: Results, folder: Path) -> None:
    """The page's pictures of the runs that are there, if any."""
    if len(results.names()) <= 1:
        return
    if pictures.shown_streams(results):
        pictures.save(pictures.loss_by_streams(results), folder / "evidence_loss_by_streams.png")
    shown = {name: label(name) for name in results.names() if name != "backbone"}
    pictures.save(pictures.gain_and_forgetting(results, shown), folder / "evidence_forgetting.png")
    priced = {name: text for name, text in PRICED.items() if results.of(name)}
    pictures.save(pictures.loss_by_price(results, priced), folder / "evidence_price.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    tables = Tables.read(TABLES)
    results = Results(tables.runs, tables.sweeps)
    write_text(PAGE, page_text(tables))
    write_text(README, readme.with_evidence(README.read_text(encoding="utf-8"), readme_section(results)))
    write_pictures(results, IMAGES)
    if tables.lab:
        pictures.save(law.picture(law.fits(TABLES / "law_lab.csv")["log"]), IMAGES / "evidence_law.png")
    print(f"{PAGE} and the part of {README} are written")


if __name__ == "__main__":
    main()
