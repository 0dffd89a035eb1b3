"""Scores in an adapter's model card, as metadata that the hub reads (`model-index`)."""

import math
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from ..checkpoints.card import new_card
from ..files import write_atomically
from .benchmarks import Benchmark
from .contenders import Contender
from .evaluating import Evaluation, Row


CARD = "README.md"
_TASK = "text-generation"


def write_cards(evaluation: Evaluation) -> list[Path]:
    """Put the scores of each adapter into the card in its folder; what else the card says stays.

    A score of the same dataset and metric is replaced, others are kept.

    Returns:
        The cards.

    Raises:
        ValueError: the metadata of a card can't be read.
    """
    written = []
    for contender in evaluation.contenders:
        own = [row for row in evaluation.rows if row.contender is contender]
        rows = [row for row in own if math.isfinite(row.score.value)]  # the hub takes no others
        if contender.source is not None and rows:
            written.append(_write_card(contender, rows, evaluation))
    return written


def _write_card(contender: Contender, rows: list[Row], evaluation: Evaluation) -> Path:
    source = contender.source
    assert source is not None
    path = source.adapter / CARD
    if path.is_file():
        try:
            card = ModelCard.load(path)
        except Exception as error:  # of YAML's and the hub's
            raise ValueError(f"The metadata of {path} can't be read: {' '.join(str(error).split())}") from error
    else:
        card = new_card("peft", source.backbone_name, f"\n# {source.adapter.resolve().name}\n")
    results = {_identity(one): one for one in card.data.eval_results or []}
    results |= {_identity(one): one for one in (_result(row, evaluation) for row in rows)}
    card.data.model_name = card.data.model_name or source.adapter.resolve().name
    card.data.eval_results = [*results.values()]
    write_atomically(path, card.save)
    return path


def _identity(result: EvalResult) -> tuple[object, ...]:
    return (*result.unique_identifier, result.metric_type, result.metric_name)


def _result(row: Row, evaluation: Evaluation) -> EvalResult:
    measure = evaluation.measures.get(row.measure)
    dataset, config, split = row.measure, None, None
    if isinstance(measure, Benchmark) and not measure.is_local:
        dataset = measure.task.get_config("dataset_path") or row.measure
        config, split = measure.task.get_config("dataset_name"), measure.task.get_config("test_split")
    metric, _, filter_name = row.metric.partition(",")
    interval = row.score.interval
    details = {"num_items": row.score.num_items, "limit": evaluation.settings.limit}
    return EvalResult(
        task_type=_TASK,
        dataset_type=dataset,
        dataset_name=row.measure,
        dataset_config=config,
        dataset_split=split,
        metric_type=metric,
        metric_name=metric if filter_name in ("", "none") else f"{metric} ({filter_name})",
        metric_value=row.score.value,
        metric_args={**details, **({} if interval is None else {"interval_95": [*interval]})},
    )
