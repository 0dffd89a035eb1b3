"""An evaluation from its settings to its table: all is checked, what is missing is measured, all is reported."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .benchmarks import BenchmarkGroup, benchmarks
from .bootstrap import Metric
from .contenders import Contender, Field, Resident, find_field, resident, shared_loads
from .environment import environment
from .evalplus import EvalPlus, find_evalplus
from .finite_logits import only_finite
from .measures import Measure, Scores
from .programs import Programs, programs
from .settings import EvaluationSettings
from .store import ScoreStore
from .texts import text_losses


@dataclass(frozen=True)
class Row:
    """One score: the metric of a measure, for a model."""

    measure: str
    kind: str
    metric: str
    contender: Contender
    score: Metric


@dataclass(frozen=True)
class Evaluation:
    """All scores, by measure, metric and model.

    Args:
        settings: what was asked for.
        contenders: the backbone first.
        rows: in the order of the settings.
        measures: by name; a group of tasks has none.
        notes: what a reader must know of the scores.
    """

    settings: EvaluationSettings
    contenders: list[Contender]
    rows: list[Row]
    measures: dict[str, Measure]
    notes: list[str]


def evaluate(settings: EvaluationSettings) -> Evaluation:
    """Score all models on all measures; a finished pair is not scored again.

    Args:
        settings: what is scored, on what.

    Raises:
        ValueError, TypeError: something can't be done as the settings say; raised before weights are read.
        ValueError: a model's logits are no finite numbers; what was finished before stays.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(f"An evaluation runs in one process, got {os.environ['WORLD_SIZE']}: launch it with one.")
    field = find_field(settings)
    evalplus = None if settings.execute_code is None else find_evalplus(Path(settings.execute_code))
    tasks, groups = benchmarks(settings)
    measures: list[Measure] = [*tasks, *text_losses(settings, field.tokenizer), *programs(settings, field.tokenizer)]
    if not measures:
        raise ValueError("Nothing is to be measured: name `tasks`, `texts`, `forgetting` or `code`.")
    names = [measure.name for measure in measures] + [group.name for group in groups]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"Two things to measure are called {twice!r}: give one another name.")
    if settings.beams and not any(measure.generates for measure in measures):
        raise ValueError("`beams` needs a task whose answers are written, and none of these is: leave it out.")
    store = ScoreStore(Path(settings.output_dir).expanduser())
    found = _measure_all(field, measures, store)
    notes: list[str] = []
    for program in measures:
        if isinstance(program, Programs):
            notes.append(_run_programs(program, evalplus, found, store, field))
    rows = _rows(field.contenders, measures, groups, found)
    return Evaluation(settings, field.contenders, rows, {one.name: one for one in measures}, notes)


Found = dict[tuple[str, str], Scores]


def _measure_all(field: Field, measures: Sequence[Measure], store: ScoreStore) -> Found:
    """Scores by measure and model; models are loaded where a pair is missing."""
    contents = {measure.name: measure.content() for measure in measures}
    found: Found = {}
    for group in shared_loads(field.contenders):
        missing = []
        for contender in group:
            for measure in measures:
                if contender.num_beams > 1 and not measure.generates:
                    continue
                content = _content(contender, contents[measure.name])
                scores = store.find(contender.name, measure.name, content)
                if scores is None:
                    missing.append((contender, measure, content))
                else:
                    found[measure.name, contender.name] = scores
        if not missing:
            continue
        with resident(field, [one for one in group if any(one is contender for contender, _, _ in missing)]) as loaded:
            for contender, measure, content in missing:
                print(f"{measure.name}: {contender.name} ...", flush=True)
                scores = _score(loaded, contender, measure, field)
                store.save(contender.name, measure.name, content, scores, environment())
                found[measure.name, contender.name] = scores
        del loaded  # before the next backbone is read
    return found


def _score(loaded: Resident, contender: Contender, measure: Measure, field: Field) -> Scores:
    with loaded.playing(contender), only_finite(loaded.model, f"{contender.name} on {measure.name}"):
        return measure.score(loaded.model, field.tokenizer, contender.num_beams)


def _content(contender: Contender, measured: dict[str, Any]) -> dict[str, Any]:
    return {"model": contender.content, "measure": measured}


def _run_programs(program: Programs, evalplus: EvalPlus | None, found: Found, store: ScoreStore, field: Field) -> str:
    """Let EvalPlus run what models wrote, where it is asked to; a sentence says how."""
    for contender in field.contenders:
        written = found.get((program.name, contender.name))
        if written is None:  # beams, which sampling has none of
            continue
        program.write_samples(written, store.folder, contender.name)
        if evalplus is None:
            continue
        content = _content(contender, program.content()) | evalplus.environment
        name = f"{program.name} results"
        scores = store.find(contender.name, name, content)
        if scores is None:
            print(f"{program.name}: running the programs of {contender.name} ...", flush=True)
            scores = evalplus.run(program, written)
            store.save(contender.name, name, content, scores, environment() | evalplus.environment)
        found[program.name, contender.name] = scores
    if evalplus is None:
        return (
            f"{program.name}: programs were written and not run, so there is no score; EvalPlus runs them where "
            "`execute_code` names the Python of its environment."
        )
    return f"{program.name}: programs ran under EvalPlus {evalplus.version}, {evalplus.isolation}."


def _rows(
    contenders: Sequence[Contender], measures: Sequence[Measure], groups: Sequence[BenchmarkGroup], found: Found
) -> list[Row]:
    members = {name: group for group in groups for name in group.tasks}
    rows, told = [], set()
    for measure in measures:
        group = members.get(measure.name)
        if group is None:
            by_model = {
                one.name: found[measure.name, one.name].metrics
                for one in contenders
                if (measure.name, one.name) in found
            }
            rows += _rows_of(measure.name, measure.kind, contenders, by_model)
        elif group.name not in told:
            told.add(group.name)
            rows += _rows_of(group.name, measure.kind, contenders, _combined(group, contenders, found))
    return rows


def _combined(group: BenchmarkGroup, contenders: Sequence[Contender], found: Found) -> dict[str, dict[str, Metric]]:
    by_model = {}
    for one in contenders:
        scores = {name: found[name, one.name].metrics for name in group.tasks if (name, one.name) in found}
        if len(scores) == len(group.tasks):
            by_model[one.name] = group.combine(scores)
    return by_model


def _rows_of(
    name: str, kind: str, contenders: Sequence[Contender], by_model: dict[str, dict[str, Metric]]
) -> list[Row]:
    metrics = {metric: None for found in by_model.values() for metric in found}  # in their order
    return [
        Row(name, kind, metric, one, by_model[one.name][metric])
        for metric in metrics
        for one in contenders
        if metric in by_model.get(one.name, {})
    ]
