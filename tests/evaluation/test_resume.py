"""What is finished is not scored again, goes on after kill -9, and is never taken for what it is not."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from support.recipe_runs import environment

from parscale_adapt import ParScaleConfig
from parscale_adapt.evaluation import EvaluationSettings, evaluate
from parscale_adapt.evaluation.contenders import Resident
from parscale_adapt.evaluation.report import report_of


LOSS = ("own", "loss (nats per token)")
TEXTS = {"tasks": [], "task_folders": []}
SECONDS = 300
# The command in a process of its own, which is killed when it is about to write its fourth score.
KILLED = """
import os, signal, sys
from parscale_adapt.evaluation.store import ScoreStore
save, count = ScoreStore.save, [0]
def killed(*arguments):
    count[0] += 1
    if count[0] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    save(*arguments)
ScoreStore.save = killed
sys.argv = ["parscale", "evaluate", sys.argv[1]]
from parscale_adapt.cli import main
main()
"""


def texts_of(scored, output_dir, **changes):
    return EvaluationSettings(
        **scored.settings(
            output_dir, **TEXTS | {"texts": [f"own={scored.text}"], "forgetting": [f"other={scored.other}"]} | changes
        )
    )


def values_of(evaluation):
    return {(row.measure, row.metric, row.contender.name): row.score for row in evaluation.rows}


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in sorted((folder / "scores").rglob("*.json"))}


@pytest.fixture
def scorings(monkeypatch):
    """Names of the models that were run, in their order."""
    played = []
    playing = Resident.playing
    monkeypatch.setattr(Resident, "playing", lambda self, one: played.append(one.name) or playing(self, one))
    return played


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_stopped(scored, tmp_path, scorings, parscale):
    pytest.importorskip("lm_eval")
    texts = {"texts": [f"own={scored.text}"]}
    config = scored.write_config(tmp_path / "killed", **texts)
    variables = environment() | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(config)], env=variables, capture_output=True, text=True, timeout=SECONDS
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    before = files_of(tmp_path / "killed")
    assert len(before) == 3
    assert not (tmp_path / "killed" / "scores.json").exists()
    code, out, err = parscale("evaluate", config)
    assert (code, "Traceback" in err) == (0, False)
    assert scorings == ["P2", "P2", "P2", "P4", "P4", "P4"]  # three tasks each; the backbone's were finished
    after = files_of(tmp_path / "killed")
    assert len(after) == 9
    assert {path: after[path] for path in before} == before
    unbroken = report_of(evaluate(EvaluationSettings(**scored.settings(tmp_path / "unbroken", **texts))))
    resumed = json.loads((tmp_path / "killed" / "scores.json").read_text())
    assert resumed["scores"] == json.loads(json.dumps(unbroken["scores"]))
    assert resumed["differences"] == json.loads(json.dumps(unbroken["differences"]))
    assert "forgetting" not in out


def test_finished_scores_are_read_and_no_weights_are(scored, tmp_path, scorings, monkeypatch):
    first = evaluate(texts_of(scored, tmp_path / "out"))
    assert len(scorings) == 6
    monkeypatch.setattr("parscale_adapt.evaluation.contenders.load_source", None)
    again = evaluate(texts_of(scored, tmp_path / "out"))
    assert len(scorings) == 6
    assert values_of(again) == values_of(first)


def test_a_new_adapter_or_text_is_scored_and_the_others_are_not(scored, tmp_path, scorings):
    evaluate(texts_of(scored, tmp_path / "out", adapters=[f"P2={scored.root / 'two'}"], forgetting=[]))
    assert scorings == ["backbone", "P2"]
    evaluate(texts_of(scored, tmp_path / "out", forgetting=[]))
    assert scorings == ["backbone", "P2", "P4"]
    evaluate(texts_of(scored, tmp_path / "out"))
    assert scorings == ["backbone", "P2", "P4", "backbone", "P2", "P4"]


def test_scores_of_other_settings_are_kept_aside_and_told(scored, tmp_path, scorings, capsys):
    one = evaluate(texts_of(scored, tmp_path / "out", adapters=[]))
    capsys.readouterr()
    other = evaluate(texts_of(scored, tmp_path / "out", adapters=[], limit=3))
    told = capsys.readouterr().out
    assert told.count("was made with other settings (measure.limit): it stays there and is not used") == 2
    assert values_of(one) != values_of(other)
    assert len(scorings) == 4
    assert values_of(evaluate(texts_of(scored, tmp_path / "out", adapters=[]))) == values_of(one)
    assert len(scorings) == 4


def test_an_adapter_is_known_by_its_content_and_not_by_its_name(scored, tmp_path, scorings):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in (scored.root / "two").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = texts_of(scored, tmp_path / "out", adapters=[f"mine={folder}"], forgetting=[])
    before = evaluate(settings)
    renamed = texts_of(scored, tmp_path / "out", adapters=[f"yours={scored.root / 'two'}"], forgetting=[])
    assert values_of(evaluate(renamed))[*LOSS, "yours"] == values_of(before)[*LOSS, "mine"]
    assert scorings == ["backbone", "mine"]
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    after = evaluate(settings)
    assert scorings == ["backbone", "mine", "mine"]
    assert values_of(after)[*LOSS, "mine"].value != values_of(before)[*LOSS, "mine"].value


def test_a_changed_text_is_scored_anew(scored, tmp_path, scorings):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one and two"}\n')
    evaluate(texts_of(scored, tmp_path / "out", adapters=[], texts=[f"own={path}"], forgetting=[]))
    path.write_text('{"text": "one and six"}\n')
    evaluate(texts_of(scored, tmp_path / "out", adapters=[], texts=[f"own={path}"], forgetting=[]))
    assert scorings == ["backbone", "backbone"]


def test_changed_items_or_code_of_a_task_are_scored_anew(scored, tmp_path, scorings):
    pytest.importorskip("lm_eval")
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "rows.jsonl"
    data.write_bytes((scored.root / "local_sums.jsonl").read_bytes())
    text = (scored.tasks / "local_sums.yaml").read_text()
    (folder / "local_sums.yaml").write_text(text.replace(str(scored.root / "local_sums.jsonl"), str(data)))
    (folder / "counting.py").write_bytes((scored.tasks / "counting.py").read_bytes())

    def run():
        changes = {"tasks": ["local_sums"], "task_folders": [str(folder)], "adapters": []}
        return evaluate(EvaluationSettings(**scored.settings(tmp_path / "out", **changes)))

    run()
    run()
    assert len(scorings) == 1
    data.write_text(data.read_text().replace("2 + 3", "2 + 4"))
    run()
    assert len(scorings) == 2
    code = (folder / "counting.py").read_text()
    (folder / "counting.py").write_text(code.replace("/ 100", "/ 10"))
    run()
    assert len(scorings) == 3


def test_a_damaged_score_is_named(scored, tmp_path):
    settings = texts_of(scored, tmp_path / "out", adapters=[])
    evaluate(settings)
    (path,) = (tmp_path / "out" / "scores" / "backbone").glob("own.*.json")
    path.write_text("{")
    with pytest.raises(ValueError, match=f"{path.name} is damaged, it is no JSON: remove it"):
        evaluate(settings)


def test_an_adapter_with_a_backbone_of_its_own_is_scored_beside_the_others(scored, tmp_path, scorings):
    model = get_peft_model(scored.plain(), ParScaleConfig(num_streams=2, num_prefix_tokens=3, train_backbone=True))
    with torch.no_grad():
        for parameter in model.get_base_model().parameters():
            parameter.mul_(1.1)
    model.save_pretrained(tmp_path / "full")
    adapters = [f"full={tmp_path / 'full'}", f"P2={scored.root / 'two'}"]
    found = values_of(evaluate(texts_of(scored, tmp_path / "out", adapters=adapters, forgetting=[])))
    assert scorings == ["backbone", "P2", "full"]
    alone = evaluate(texts_of(scored, tmp_path / "alone", forgetting=[]))
    assert found[*LOSS, "P2"].value == values_of(alone)[*LOSS, "P2"].value
    assert found[*LOSS, "backbone"].value == values_of(alone)[*LOSS, "backbone"].value
    assert found[*LOSS, "full"].value != found[*LOSS, "P2"].value
