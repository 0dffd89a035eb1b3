"""Folders of runs as the page reads them: finished, running, of older versions, and half-written."""

import json
import os
import platform
import time

import pytest

from parscale_adapt.page.runs import RunReader


def entry(step, **figures):
    return {"step": step, "num_input_tokens_seen": 100 * step, "time": 1000.0 + 2 * step, **figures}


LOG = [
    {"step": 0, "num_input_tokens_seen": 0, "time": 1000.0},
    entry(1, loss=5.0, **{"stream_weight/0": 0.6, "stream_weight/1": 0.4, "stream_entropy": 0.67}),
    entry(2, loss=4.0, **{"stream_weight/0": 0.7, "stream_weight/1": 0.3, "stream_entropy": 0.61}),
    {**entry(2, eval_loss=4.5), "time": 1010.0},
    {**entry(3, loss=3.0, **{"stream_weight/0": 0.8, "stream_weight/1": 0.2}), "time": 1011.0},
]
METRICS = {
    "heldout_loss": 2.5,
    "heldout": {"accuracy": 0.75, "name": "no number", "odd": float("nan")},
    "loss": "loss (nats per token)",
    "num_tokens": 300,
    "streams": {"num_streams": 2, "aggregator_smoothing": 0.0},
    "log_history": LOG,
}


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    names = {"run": "run.json", "metrics": "metrics.json", "log": "log.jsonl", "lock": ".lock"}
    for name, content in files.items():
        if name == "log" and isinstance(content, list):
            content = "".join(json.dumps(line) + "\n" for line in content)
        (folder / names[name]).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def strict(value):
    """As a browser reads it: JSON has no NaN."""
    return json.loads(json.dumps(value, allow_nan=False))


def only_run(folder):
    (run,) = strict(RunReader(folder).overview())["runs"]
    return run


def test_a_finished_run_shows_what_it_logged(tmp_path):
    write(tmp_path / "a" / "b", run={"streams": {"num_streams": 2}}, metrics=METRICS, log=LOG)
    os.utime(tmp_path / "a" / "b" / "log.jsonl", (time.time() - 10,) * 2)
    run = only_run(tmp_path)
    assert (run["name"], run["state"], run["num_streams"], run["step"]) == ("a/b", "finished", 2, 3)
    assert (run["loss"], run["heldout_loss"], run["num_tokens"]) == (3.0, 2.5, 300)
    assert run["heldout"] == {"accuracy": 0.75}
    details = strict(RunReader(tmp_path).details("a/b"))
    assert details["training"] == [[1, 5.0], [2, 4.0], [3, 3.0]]
    assert details["heldout_curve"] == [[2, 4.5]]
    assert details["weights"] == [[[1, 0.6], [2, 0.7], [3, 0.8]], [[1, 0.4], [2, 0.3], [3, 0.2]]]
    assert details["entropy"] == [[1, 0.67], [2, 0.61]]
    # The evaluation between steps 2 and 3 is no time of training.
    assert details["speed"] == [[1, 50.0], [2, 50.0], [3, 100.0]]


def test_a_run_is_running_while_its_process_lives(tmp_path):
    folder = write(tmp_path / "run", run={}, log=LOG, lock=f"process {os.getpid()} on {platform.node()}")
    assert only_run(tmp_path)["state"] == "running"
    write(folder, lock=f"process {2**22 + 1} on {platform.node()}")
    assert only_run(tmp_path)["state"] == "stopped"
    write(folder, lock=f"process {os.getpid()} on elsewhere")
    assert only_run(tmp_path)["state"] == "stopped"


def test_a_run_that_went_on_after_its_report_is_not_finished(tmp_path):
    folder = write(tmp_path / "run", run={}, metrics=METRICS, log=LOG)
    os.utime(folder / "metrics.json", (time.time() - 10,) * 2)
    assert only_run(tmp_path)["state"] == "stopped"


def test_runs_of_versions_without_a_log_show_their_report_or_their_last_checkpoint(tmp_path):
    folder = write(tmp_path / "run", run={})
    for step in (9, 10):
        (folder / f"checkpoint-{step}").mkdir()
        state = {"log_history": [{"step": step, "loss": 1.0 * step}]}
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
        os.utime(folder / f"checkpoint-{step}" / "trainer_state.json", (step, step))
    assert only_run(tmp_path)["loss"] == 10.0
    write(folder, metrics=METRICS)
    assert only_run(tmp_path)["loss"] == 3.0
    assert RunReader(tmp_path).details("run")["speed"]


@pytest.mark.parametrize("name", ["run", "metrics", "log"])
def test_every_beginning_of_every_file_can_be_read(tmp_path, name):
    whole = {"run": json.dumps({"streams": {"num_streams": 2}}), "metrics": json.dumps(METRICS)}
    whole["log"] = "".join(json.dumps(line) + "\n" for line in LOG)
    folder = write(tmp_path / "run", **whole)
    for end in range(len(whole[name])):
        write(folder, **{name: whole[name][:end]})
        assert only_run(tmp_path)["name"] == "run"
        strict(RunReader(tmp_path).details("run"))


@pytest.mark.parametrize(
    "damaged",
    ["[]", "null", "3", '"text"', '{"log_history": 3, "streams": [], "heldout": [], "loss": {}}', "\x00\xff"],
)
def test_files_that_hold_something_else_break_nothing(tmp_path, damaged):
    write(tmp_path / "run", run=damaged, metrics=damaged, log=f"{damaged}\n{json.dumps(LOG[1])}\n{damaged}")
    run = strict(RunReader(tmp_path).details("run"))
    assert run["training"] == [[1, 5.0]]
    assert run["loss_label"] == "loss"


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    write(
        tmp_path / "run",
        run={},
        log=[{"step": 1, "loss": float("nan")}, {"step": 2, "loss": "much"}, {"loss": 1.0}, entry(3, loss=2.0)],
    )
    assert RunReader(tmp_path).details("run")["training"] == [(3, 2.0)]


def test_a_collapse_is_told_as_the_run_itself_was_told(tmp_path):
    leaning = {"stream_weight/0": 0.99, "stream_weight/1": 0.01}
    write(
        tmp_path / "run",
        run={"streams": {"aggregator_smoothing": 0.0}},
        log=[entry(step, loss=1.0, **leaning) for step in (1, 2, 3)],
    )
    (trouble,) = RunReader(tmp_path).details("run")["troubles"]
    assert trouble.startswith("The aggregator has collapsed on stream 0: for 3 logs, up to step 3")


def test_long_runs_are_thinned_to_their_last_point(tmp_path):
    write(tmp_path / "run", run={}, log=[entry(step, loss=float(step)) for step in range(1, 5001)])
    points = RunReader(tmp_path).details("run")["training"]
    assert len(points) == 1000
    assert points[-1] == (5000, 5000.0)
    assert points == sorted(points)


def test_a_folder_that_is_not_there_has_no_runs_until_it_is(tmp_path):
    reader = RunReader(tmp_path / "later")
    assert reader.overview() == {"folder": str(tmp_path / "later"), "is_there": False, "runs": [], "num_older": 0}
    write(tmp_path / "later", run={}, log=LOG)
    assert reader.overview()["runs"][0]["name"] == "."
    assert reader.overview()["runs"][0]["label"] == "later"
    assert reader.details(".")["training"]


def test_of_too_many_runs_the_newest_are_shown_and_the_others_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("parscale_adapt.page.runs._MAX_RUNS", 2)
    for age, name in enumerate(("newest", "a", "b")):
        for file in write(tmp_path / name, run={}).iterdir():
            os.utime(file, (1000 - age, 1000 - age))
    overview = RunReader(tmp_path).overview()
    assert [run["name"] for run in overview["runs"]] == ["newest", "a"]
    assert overview["num_older"] == 1
    assert RunReader(tmp_path).details("b")["name"] == "b"
