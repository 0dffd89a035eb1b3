"""The page's law: the very figures of `parscale predict` and `parscale cost`."""

import json

import pytest

from parscale_adapt.analysis.runs import published_runs
from parscale_adapt.page.law import LawDesk


CHOICE = {
    "law": "pile",
    "model": "1.6B",
    "device": "h100",
    "num_params": "1571472384",
    "num_streams": "5",
    "batch_size": "2",
    "input_len": "128",
    "output_len": "64",
}


@pytest.fixture(scope="module")
def desk():
    return LawDesk()


def test_predictions_are_those_of_the_command(desk, parscale, tmp_path):
    found = desk.figures(CHOICE)
    path = tmp_path / "predict.json"
    counts = [word for count in (1, 2, 4, 5, 8) for word in ("--num-streams", count)]
    assert parscale("predict", "--model", "1.6B", "--law", "pile", *counts, "--json", path)[0] == 0
    told = json.loads(path.read_text())
    assert found["predictions"] == told["rows"]
    assert found["law"] == told["law"]


def test_costs_are_those_of_the_command(desk, parscale, tmp_path):
    found = desk.figures(CHOICE)["comparison"]
    path = tmp_path / "cost.json"
    options = ("--num-streams", 5, "--batch-size", 2, "--input-len", 128, "--output-len", 64, "--device", "h100")
    assert parscale("cost", "--model", "1.6B", "--law", "pile", *options, "--json", path)[0] == 0
    assert json.loads(path.read_text()) == {**found, "dtype": "bfloat16"}
    assert found["rows"][1]["fits"]
    assert not desk.figures({**CHOICE, "num_params": "90000000000"})["comparison"]["rows"][0]["fits"]


def test_a_size_widens_the_chosen_shape(desk):
    comparison = desk.figures({**CHOICE, "num_params": "3000000000"})["comparison"]
    assert comparison["rows"][0]["backbone_params"] == pytest.approx(3e9)
    assert comparison["rows"][0]["memory_gib"] > desk.figures(CHOICE)["comparison"]["rows"][0]["memory_gib"]


def test_points_and_curves_are_of_the_law_itself(desk):
    found = desk.figures(CHOICE)
    runs = published_runs("pile")
    assert found["points"] == [
        {"num_params": run.num_params, "num_streams": run.num_streams, "loss": run.loss} for run in runs
    ]
    assert [curve["num_streams"] for curve in found["curves"]] == [1, 2, 4, 5, 8]
    for curve in found["curves"]:
        assert curve["loss"] == sorted(curve["loss"], reverse=True)
        assert curve["num_params"][0] < min(run.num_params for run in runs)


def test_ones_own_law_stands_beside_the_papers(parscale, tmp_path, chat_material):
    path = tmp_path / "law.json"
    assert parscale("fit-law", "stack-v2-python", "--bootstrap", 0, "--json", path)[0] == 0
    desk = LawDesk(str(path), chat_material.root / "backbone")
    choices = desk.choices()
    assert choices["laws"] == [str(path), "stack-v2-python", "pile"]
    own, paper = (desk.figures({**CHOICE, "law": name}) for name in (str(path), "stack-v2-python"))
    assert own["law"] == paper["law"]
    assert own["points"] == paper["points"]
    (model,) = [model for model in choices["models"] if model["label"] == "backbone"]
    found = desk.figures({**CHOICE, "model": model["name"], "num_params": str(model["num_params"])})
    assert found["comparison"]["model"] == "backbone"


def test_a_model_that_the_formulas_do_not_cover_is_no_choice(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "num_hidden_layers": 2}')
    assert all(model["label"] != tmp_path.name for model in LawDesk(None, tmp_path).choices()["models"])


def test_a_file_without_a_law_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither stack-v2-python nor pile nor a file"):
        LawDesk(str(tmp_path / "missing.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"law": "own"}, "`law` must be one of stack-v2-python, pile, got 'own'"),
        ({"model": "/etc"}, "`model` must be one of 0.5B"),
        ({"device": "abacus"}, "no device is called `abacus`"),
        ({"num_streams": "1"}, "needs at least 2 streams, got 1"),
        ({"batch_size": "0"}, "`batch_size` must be a whole number of at least 1, got '0'"),
        ({"input_len": "1.5"}, "`input_len` must be a whole number of at least 1, got '1.5'"),
        ({"num_params": "9" * 400}, "`num_params` must be a whole number"),
    ],
)
def test_a_wrong_choice_is_one_sentence(desk, change, message):
    with pytest.raises(ValueError, match=message):
        desk.figures({**CHOICE, **change})
