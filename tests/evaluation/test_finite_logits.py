"""Models whose logits are no numbers get no score, and what JSON can't hold is left out of it."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.scored_material import TASKS

from parscale_adapt.evaluation import EvaluationSettings, evaluate, show_report
from parscale_adapt.evaluation.bootstrap import Metric
from parscale_adapt.evaluation.contenders import Contender
from parscale_adapt.evaluation.evaluating import Evaluation, Row


@pytest.fixture(scope="module")
def spoiled(scored, tmp_path_factory):
    """An adapter whose tensors are no numbers."""
    folder = tmp_path_factory.mktemp("spoiled") / "nan"
    shutil.copytree(scored.root / "two", folder)
    path = folder / "adapter_model.safetensors"
    tensors = {name: torch.full_like(tensor, math.nan) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("measure", [*TASKS, "own"])
def test_a_model_whose_logits_are_no_numbers_gets_no_score(scored, spoiled, tmp_path, measure):
    if measure in TASKS:
        pytest.importorskip("lm_eval")
        changes = {"tasks": [measure]}
    else:
        changes = {"tasks": [], "task_folders": [], "texts": [f"own={scored.text}"]}
    settings = EvaluationSettings(**scored.settings(tmp_path / "out", adapters=[f"nan={spoiled}"], **changes))
    with pytest.raises(ValueError, match=f"The logits of nan on {measure} are no finite numbers"):
        evaluate(settings)
    assert [path.parent.name for path in (tmp_path / "out").glob("scores/*/*.json")] == ["backbone"]


def test_an_infinite_metric_and_a_name_like_a_formula_are_reported(tmp_path):
    contenders = [Contender(name, 1, 1, None, {}) for name in ("backbone", r"p$\x_{$")]
    rows = [
        Row("own", "task", "perplexity", one, Metric(value, False, 1))
        for one, value in zip(contenders, (2.0, math.inf))
    ]
    show_report(Evaluation(EvaluationSettings(output_dir=str(tmp_path)), contenders, rows, {}, []))
    assert (tmp_path / "scores.png").stat().st_size > 1000

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    report = json.loads((tmp_path / "scores.json").read_text(), parse_constant=refuse)
    assert [score["value"] for score in report["scores"]] == [2.0, None]
    assert [difference["value"] for difference in report["differences"]] == [None]
