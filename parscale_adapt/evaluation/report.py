"""What an evaluation says: one table, `scores.json`, a picture, and metadata of model cards."""

import json
import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..files import write_atomically, write_text
from ..terminal import console
from .bootstrap import CONFIDENCE, NUM_REPLICATES, Difference, paired_difference
from .cards import write_cards
from .contenders import PLAIN
from .environment import environment
from .evaluating import Evaluation, Row
from .settings import named_entries


SCORES_FILE, PICTURE_FILE = "scores.json", "scores.png"


def show_report(evaluation: Evaluation) -> dict[str, Any]:
    """Print the table, and write JSON, picture and, where asked for, model cards.

    Returns:
        What is in `scores.json`.
    """
    from .pictures import draw_scores, save  # matplotlib is needed here alone

    folder = Path(evaluation.settings.output_dir).expanduser()
    report = report_of(evaluation)
    write_text(folder / SCORES_FILE, json.dumps(report, indent=2, allow_nan=False) + "\n")
    if evaluation.rows:
        figure = draw_scores(evaluation.rows, evaluation.contenders)
        write_atomically(folder / PICTURE_FILE, lambda path: save(figure, path))
        console().print(table_of(evaluation))
    for note in evaluation.notes:
        print(note)
    written = [folder / SCORES_FILE, *([folder / PICTURE_FILE] if evaluation.rows else [])]
    if evaluation.settings.write_cards:
        written += write_cards(evaluation)
    print("Written: " + ", ".join(map(str, written)))
    return report


def report_of(evaluation: Evaluation) -> dict[str, Any]:
    """Scores with intervals, and the differences of every two models on the same items, JSON-able."""
    settings = evaluation.settings
    adapters = {entry["name"]: str(entry["path"]) for entry in named_entries(settings.adapters, "adapters", ())}
    return {
        "backbone": settings.backbone,
        "models": [
            {
                "name": one.name,
                "num_streams": one.num_streams,
                "num_beams": one.num_beams,
                "adapter": adapters.get(one.name),
            }
            for one in evaluation.contenders
        ],
        "limit": settings.limit,
        "confidence": CONFIDENCE,
        "bootstrap": {"kind": "percentile, over items", "replicates": NUM_REPLICATES},
        "scores": [_score(row) for row in evaluation.rows],
        "differences": [
            {
                "measure": one.measure,
                "metric": one.metric,
                "model": one.contender.name,
                "minus": other.contender.name,
                "value": finite_or_none(difference.value),
                "interval": difference.interval,
            }
            for one, other, difference in differences(evaluation.rows)
        ],
        "notes": evaluation.notes,
        "environment": environment(),
    }


def _score(row: Row) -> dict[str, Any]:
    return {
        "measure": row.measure,
        "kind": row.kind,
        "metric": row.metric,
        "model": row.contender.name,
        "value": finite_or_none(row.score.value),
        "interval": row.score.interval,
        "higher_is_better": row.score.higher_is_better,
        "num_items": row.score.num_items,
    }


def finite_or_none(value: float) -> float | None:
    """What JSON can hold of a score: a task's own metric may be infinite, such as a perplexity."""
    return value if math.isfinite(value) else None


def differences(rows: list[Row]) -> Iterator[tuple[Row, Row, Difference]]:
    """Every two models on one metric, the later one minus the earlier one."""
    by_metric: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_metric.setdefault((row.measure, row.metric), []).append(row)
    for same in by_metric.values():
        for earlier, later in combinations(same, 2):
            yield later, earlier, paired_difference(later.score, earlier.score)


def table_of(evaluation: Evaluation) -> Table:
    """One line for each score: its interval, and the paired difference from the backbone with a star where it is clear."""
    from_backbone = {
        (one.measure, one.metric, one.contender.name): difference
        for one, other, difference in differences(evaluation.rows)
        if other.contender.name == PLAIN
    }
    limit = "" if evaluation.settings.limit is None else f", first {evaluation.settings.limit} items"
    table = Table(
        title=f"Scores with {CONFIDENCE:.0%} intervals{limit}; * the interval of the difference leaves 0 out",
        box=SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
    )
    for column in ("measure", "metric", "model", "P", "items", "score", "interval", "- backbone", "interval"):
        is_text = column in ("measure", "metric", "model")
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    told: tuple[str, str] = ("", "")
    for row in evaluation.rows:
        names = (_measure_text(row), _metric_text(row))
        difference = from_backbone.get((row.measure, row.metric, row.contender.name))
        table.add_row(
            names[0] if names[0] != told[0] else "",
            names[1] if names != told else "",
            row.contender.name,
            str(row.contender.num_streams),
            f"{row.score.num_items:,}",
            f"{row.score.value:.4f}",
            interval_text(row.score.interval),
            "" if difference is None else f"{difference.value:+.4f}{'*' if difference.is_clear else ' '}",
            "" if difference is None else interval_text(difference.interval, "+"),
        )
        told = names
    return table


def _measure_text(row: Row) -> str:
    return f"{row.measure} (forgetting)" if row.kind == "forgetting" else row.measure


def _metric_text(row: Row) -> str:
    better = {True: "", False: ", lower is better", None: ""}[row.score.higher_is_better]
    return row.metric.removesuffix(",none") + better


def interval_text(interval: tuple[float, float] | None, sign: str = "") -> str:
    """Both ends, or a dash where there is none."""
    return "-" if interval is None else f"{interval[0]:{sign}.4f} to {interval[1]:{sign}.4f}"
