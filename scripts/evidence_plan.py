"""Which experiments make up the table, in the order in which they are run, and what the sweeps decide."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from evidence_methods import BACKBONE, FULL, LORA, PARSCALE, PREFIX_TUNING, SHARED_LORA_RANK, Experiment, Rates
from evidence_rows import DIVERGED, FINISHED, best, read_rows


SWEEP_STEPS = 48
AGGREGATOR_RATE = 3e-4  # at the prefixes' rate it swings between streams
LORA_RATE_IN_SWEEPS = 1e-3
STARTS = ("near_identity", "tokens", "normal", "reparameterized")
STREAMS = (2, 4, 8)
DIVERSITY_WEIGHTS = (1.0, 10.0)  # of a mean squared correlation, which is a few hundredths
# LoRA ranks with as many parameters as P streams (48 prefix tokens each, and the aggregator) on SmolLM2-135M,
# alone and beside a shared LoRA of rank 8.
RANK_OF_STREAMS = {2: 6, 4: 12, 8: 23}
RANK_OF_LORA_AND_STREAMS = {2: 14, 4: 20, 8: 31}
PREFIX_RATES = (3e-3, 1e-2, 3e-2)
LOW_RANK_RATES = (5e-4, 1e-3, 2e-3)


def sweeps() -> dict[str, list[Experiment]]:
    """Short runs at several rates, by family; named `sweep/<family>/<rate>`."""
    families = {
        "lora": _sweep("lora", Experiment("", LORA, lora_rank=SHARED_LORA_RANK), "lora", (*LOW_RANK_RATES, 4e-3)),
        "prefix_tuning": _sweep(
            "prefix_tuning", Experiment("", PREFIX_TUNING, 4, start="tokens"), "prefix", PREFIX_RATES
        ),
    }
    streams = Experiment("", PARSCALE, 4, rates=Rates(aggregator=AGGREGATOR_RATE))
    for start in STARTS:
        started = dataclasses.replace(streams, start=start)
        families[f"streams_{start}"] = _sweep(f"streams_{start}", started, "prefix", PREFIX_RATES)
    for start in STARTS[:2]:
        rates = Rates(aggregator=AGGREGATOR_RATE, lora=LORA_RATE_IN_SWEEPS)
        both = dataclasses.replace(streams, start=start, lora_rank=SHARED_LORA_RANK, rates=rates)
        families[f"lora_streams_{start}"] = _sweep(f"lora_streams_{start}", both, "prefix", PREFIX_RATES)
    low_rank = dataclasses.replace(streams, transforms=("lora",), start="")
    families["stream_lora"] = _sweep("stream_lora", low_rank, "prefix", LOW_RANK_RATES)
    together = dataclasses.replace(streams, transforms=("prefix", "lora"))
    families["stream_both"] = _sweep("stream_both", together, "prefix", (1e-3, *PREFIX_RATES[:2]))
    families["full"] = _sweep("full", Experiment("", FULL), "backbone", (1e-5, 3e-5, 1e-4, 3e-4))
    return families


def _sweep(family: str, experiment: Experiment, part: str, rates: tuple[float, ...]) -> list[Experiment]:
    return [
        dataclasses.replace(
            experiment,
            name=f"sweep/{family}/{rate:g}",
            rates=dataclasses.replace(experiment.rates, **{part: rate}),
            steps=SWEEP_STEPS,
        )
        for rate in rates
    ]


def sweep_plan() -> list[tuple[Experiment, int]]:
    """All sweeps, with their one seed."""
    return [(run, 0) for family in sweeps().values() for run in family]


def finished_sweeps(file: Path, data: str) -> list[dict[str, str]] | None:
    """The rows of a table of sweeps if none is missing, of whatever machine: a rate that was best elsewhere can be taken.

    Raises:
        ValueError: they are of other data.
    """
    rows = read_rows(file) if file.is_file() else []
    ended = {row["name"] for row in rows if row["status"].startswith((FINISHED, DIVERGED))}
    if not {run.name for run, _ in sweep_plan()} <= ended:
        return None
    for row in rows:
        if row["data"] != data:
            raise ValueError(
                f"{file} chose learning rates on data {row['data']}, and here it is {data}: run the sweeps again, into "
                "another file, by --sweeps."
            )
    return rows


class Choices:
    """What the finished sweeps decide: rates by family, and the start of the prefixes."""

    def __init__(self, rows: list[dict[str, str]]):
        self._families = sweeps()
        self._rows = rows
        self.start = self._of([f"streams_{start}" for start in STARTS]).start
        self.start_with_lora = self._of([f"lora_streams_{start}" for start in STARTS[:2]]).start

    def rates(self, family: str) -> Rates:
        """The best rates of a family."""
        return self._of([family]).rates

    def _of(self, families: list[str]) -> Experiment:
        experiments = {run.name: run for family in families for run in self._families[family]}
        name = best(self._rows, experiments)
        if name is None:
            raise ValueError(f"No sweep of {', '.join(families)} has finished: run the script without --only first.")
        return experiments[name]


def experiments(rows: list[dict[str, str]], num_seeds: int) -> Iterator[tuple[Experiment, int]]:
    """The main runs with their seeds, those that carry the most weight first.

    Raises:
        ValueError: a sweep that they need has not finished.
    """
    chosen = Choices(rows)
    yield Experiment("backbone", BACKBONE, steps=0), 0
    for seed in range(num_seeds):
        for experiment in _claims(chosen):
            yield experiment, seed
        if seed == 0:
            for experiment in _variants(chosen):
                yield experiment, seed
    for seed in range(1, num_seeds):
        for experiment in _other_starts(chosen):
            yield experiment, seed


def _claims(chosen: Choices) -> Iterator[Experiment]:
    lora = chosen.rates("lora")
    streams = Experiment("", PARSCALE, start=chosen.start, rates=chosen.rates(f"streams_{chosen.start}"))
    combined_rates = chosen.rates(f"lora_streams_{chosen.start_with_lora}")
    combined = Experiment(
        "",
        PARSCALE,
        start=chosen.start_with_lora,
        lora_rank=SHARED_LORA_RANK,
        rates=dataclasses.replace(combined_rates, lora=lora.lora),
    )
    yield Experiment("lora8", LORA, lora_rank=8, rates=lora)
    for counts in (STREAMS[:2], STREAMS[2:]):  # P=8 takes as long as all others together
        for count in counts:
            yield dataclasses.replace(combined, name=f"lora8+streams{count}", num_streams=count)
            rank = RANK_OF_LORA_AND_STREAMS[count]
            yield Experiment(f"lora{rank}", LORA, lora_rank=rank, rates=lora)
        for count in counts:
            name, rates = f"lora8+prefix_tuning{count * 48}", dataclasses.replace(combined.rates, aggregator=None)
            yield dataclasses.replace(combined, name=name, method=PREFIX_TUNING, num_streams=count, rates=rates)
        for count in counts:
            yield dataclasses.replace(streams, name=f"streams{count}", num_streams=count)
            rank = RANK_OF_STREAMS[count]
            yield Experiment(f"lora{rank}", LORA, lora_rank=rank, rates=lora)
            tuned = Experiment("", PREFIX_TUNING, count, start="tokens", rates=chosen.rates("prefix_tuning"))
            yield dataclasses.replace(tuned, name=f"prefix_tuning{count * 48}")
        if counts == STREAMS[:2]:
            yield Experiment("lora8_4x_tokens", LORA, lora_rank=8, rates=lora, steps=4 * Experiment("", LORA).steps)
    full = chosen.rates("full")
    yield Experiment("full1", FULL, rates=full)
    stream_rates = chosen.rates(f"streams_{chosen.start}")
    for count in STREAMS[:2]:
        rates = dataclasses.replace(stream_rates, backbone=full.backbone)
        yield Experiment(f"full{count}", FULL, count, start=chosen.start, rates=rates)


def _other_starts(chosen: Choices) -> Iterator[Experiment]:
    for start in STARTS:
        if start != chosen.start:
            rates = chosen.rates(f"streams_{start}")
            yield Experiment(f"streams4_start_{start}", PARSCALE, 4, start=start, rates=rates)


def _variants(chosen: Choices) -> Iterator[Experiment]:
    yield from _other_starts(chosen)
    base = Experiment("", PARSCALE, 4, start=chosen.start, rates=chosen.rates(f"streams_{chosen.start}"))
    for smoothing in (0.0, 0.01):
        yield dataclasses.replace(base, name=f"streams4_smoothing_{smoothing:g}", smoothing=smoothing)
    low_rank = {"transforms": ("lora",), "start": "", "rates": chosen.rates("stream_lora")}
    yield dataclasses.replace(base, name="streams4_lora", **low_rank)
    together = {"transforms": ("prefix", "lora"), "rates": chosen.rates("stream_both"), "start": "tokens"}
    yield dataclasses.replace(base, name="streams4_prefix+lora", **together)
    for weight in DIVERSITY_WEIGHTS:
        yield dataclasses.replace(base, name=f"streams4_diversity_{weight:g}", diversity_weight=weight)
