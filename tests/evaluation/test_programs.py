"""Programs that models write: in EvalPlus's format, run only where asked for, and never in this process."""

import gzip
import itertools
import json
import os
import sys

import numpy as np
import pytest
from support.stand_in_evalplus import PROBLEMS, STAND_IN, TESTS

from parscale_adapt.evaluation import EvaluationSettings, evaluate, show_report
from parscale_adapt.evaluation.programs import cut_at, pass_at_k, programs


def problems_file(folder, **more):
    path = folder / "problems.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(problem | more) + "\n" for problem in PROBLEMS)
    return path


def settings_of(scored, tmp_path, entry, **changes):
    fields = {"tasks": [], "task_folders": [], "code": [entry], "max_code_tokens": 8} | changes
    return EvaluationSettings(**scored.settings(tmp_path / "out", **fields))


@pytest.fixture
def stand_in(tmp_path):
    path = tmp_path / "python"
    path.write_text(STAND_IN.replace("SEEN", repr(str(tmp_path / "seen.json"))))
    path.chmod(0o755)
    return path


def test_pass_at_k_is_the_share_of_choices_with_a_right_one():
    for number, right, k in ((5, 2, 1), (6, 2, 3), (4, 0, 2), (4, 4, 2), (10, 3, 10), (5, 4, 3)):
        choices = list(itertools.combinations([True] * right + [False] * (number - right), k))
        assert pass_at_k(number, right, k) == pytest.approx(np.mean([any(choice) for choice in choices]))


def test_a_program_ends_at_the_first_stop():
    assert cut_at("    return x\n\ndef g(): pass\nprint(1)", ["\nprint(", "\ndef "]) == "    return x\n"
    assert cut_at("    return x", ["\nprint("]) == "    return x"


def test_programs_are_the_greedy_answers_of_each_model_and_are_not_run(scored, tmp_path, capsys):
    entry = {"name": "humaneval", "path": str(problems_file(tmp_path)), "num_samples": 2}
    evaluation = evaluate(settings_of(scored, tmp_path, entry, beams=[2]))
    report = show_report(evaluation)
    assert report["scores"] == []
    assert "programs were written and not run, so there is no score" in capsys.readouterr().out
    sampled = {path.stem for path in (tmp_path / "out" / "programs").glob("humaneval_sampled_*")}
    assert sampled == {f"humaneval_sampled_{name}" for name in ("backbone", "P2", "P4")}  # beams sample nothing
    models = {"backbone": (scored.plain(), 1), "2_beams": (scored.plain(), 2), "P2": (scored.adapted("two"), 1)}
    for name, (model, beams) in models.items():
        lines = (tmp_path / "out" / "programs" / f"humaneval_{name}.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        assert [line["task_id"] for line in found] == [problem["task_id"] for problem in PROBLEMS]
        for line, problem in zip(found, PROBLEMS):
            tokens = scored.tokenizer(problem["prompt"], return_tensors="pt").input_ids
            output = model.generate(tokens, max_new_tokens=8, do_sample=False, num_beams=beams)[0, tokens.shape[1] :]
            text = scored.tokenizer.decode(output, skip_special_tokens=True)
            assert line["solution"] == problem["prompt"] + cut_at(text, ["\ndef ", "\nprint("])


def test_samples_differ_come_again_by_seed_and_beams_have_none(scored, tmp_path):
    entry = {"name": "humaneval", "path": str(problems_file(tmp_path)), "num_samples": 5}
    greedy, sampled = programs(settings_of(scored, tmp_path, entry, batch_size=2), scored.tokenizer)
    assert (greedy.generates, sampled.generates) == (True, False)
    model = scored.plain()
    found = sampled.score(model, scored.tokenizer, 1)
    assert [len(item["solutions"]) for item in found.items] == [5, 5, 5]
    assert len({*found.items[0]["solutions"]}) > 1
    assert sampled.score(model, scored.tokenizer, 1).items == found.items
    _, other = programs(settings_of(scored, tmp_path, entry, batch_size=2, seed=1), scored.tokenizer)
    assert other.score(model, scored.tokenizer, 1).items != found.items
    assert other.content() != sampled.content()


def test_programs_are_run_where_that_is_asked_for_and_once(scored, tmp_path, stand_in, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "secret")
    entry = {"name": "humaneval", "path": str(problems_file(tmp_path, **TESTS)), "num_samples": 10}
    settings = settings_of(scored, tmp_path, entry, execute_code=str(stand_in), adapters=[])
    evaluation = evaluate(settings)
    values = {(row.measure, row.metric): row.score.value for row in evaluation.rows}
    # Greedy: of the programs 0, 1, 2 the first and last pass. Sampled: five of ten pass, for the second problem not all tests.
    assert values == pytest.approx(
        {
            ("humaneval", "pass@1 (base)"): 2 / 3,
            ("humaneval", "pass@1 (plus)"): 2 / 3,
            ("humaneval sampled", "pass@1 (base)"): 1 / 2,
            ("humaneval sampled", "pass@10 (base)"): 1.0,
            ("humaneval sampled", "pass@1 (plus)"): 1 / 3,
            ("humaneval sampled", "pass@10 (plus)"): 2 / 3,
        }
    )
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert "HF_TOKEN" not in seen["variables"]
    assert seen["home"] != os.environ.get("HOME")
    assert seen["problems"] == 3
    assert "programs ran under EvalPlus 0.0.test, with" in evaluation.notes[0]
    (tmp_path / "seen.json").unlink()
    again = evaluate(settings)
    assert not (tmp_path / "seen.json").exists()
    assert {(row.measure, row.metric): row.score.value for row in again.rows} == values


def test_what_can_not_be_run_is_refused(scored, tmp_path, stand_in):
    path = problems_file(tmp_path)
    with pytest.raises(ValueError, match="lacks the tests that EvalPlus runs"):
        programs(settings_of(scored, tmp_path, f"humaneval={path}", execute_code=str(stand_in)), scored.tokenizer)
    with pytest.raises(ValueError, match=r"has no EvalPlus \(ModuleNotFoundError"):
        evaluate(settings_of(scored, tmp_path, f"humaneval={path}", execute_code=sys.executable))
    stand_in.write_text(STAND_IN.replace("evalplus.sanitize", "nothing"))
    path = problems_file(tmp_path, **TESTS)
    with pytest.raises(ValueError, match=r"evalplus.sanitize in .* failed with exit code 1: unknown"):
        evaluate(settings_of(scored, tmp_path, f"humaneval={path}", execute_code=str(stand_in), adapters=[]))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no problems"), ("no json", "holds no JSON lines"), ('{"task_id": "a"}', "row 1, lacks `prompt`")],
)
def test_a_file_that_holds_no_problems_is_refused(scored, tmp_path, text, message):
    path = tmp_path / "problems.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        programs(settings_of(scored, tmp_path, f"mbpp={path}"), scored.tokenizer)
