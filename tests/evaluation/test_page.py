"""docs/evaluation.md and recipes/evaluate.py: the page's files and commands on tiny models, and the ready YAMLs."""

import json
import re
import shlex
import shutil

import pytest
import yaml
from support.recipe_runs import REPOSITORY
from support.stand_in_evalplus import PROBLEMS, STAND_IN, TESTS

from parscale_adapt.evaluation import read_settings


PAGE = (REPOSITORY / "docs" / "evaluation.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def place(scored, tmp_path, monkeypatch):
    """A folder where what the page names lies."""
    monkeypatch.chdir(tmp_path)
    for name, folder in {"two": "runs/p2", "four": "runs/p4"}.items():
        shutil.copytree(scored.root / name, folder)
    for name, renamed in {"local_choice": "my_choice", "local_sums": "my_sums"}.items():
        text = (scored.tasks / f"{name}.yaml").read_text().replace(f"task: {name}", f"task: {renamed}")
        (tmp_path / "my" / "tasks").mkdir(parents=True, exist_ok=True)
        (tmp_path / "my" / "tasks" / f"{renamed}.yaml").write_text(text)
    shutil.copy(scored.tasks / "counting.py", "my/tasks")
    shutil.copy(scored.text, "my/heldout.jsonl")
    (tmp_path / "my" / "gsm8k.jsonl").write_text('{"question": "How many are 2 and 2?"}\n{"question": "And 3?"}\n')
    return tmp_path


def commands(block):
    return [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("parscale ")]


def test_the_file_and_the_commands_of_the_page_run(scored, parscale, place):
    pytest.importorskip("lm_eval")
    settings = yaml.safe_load(blocks("yaml")[0])
    assert settings["backbone"] == "Qwen/Qwen2.5-3B"
    (place / "scores.yaml").write_text(yaml.safe_dump(settings | {"backbone": str(scored.root / "backbone")}))
    first, second = commands(blocks("bash")[0])
    assert parscale(*first)[0] == 0
    report = json.loads((place / "runs" / "scores" / "scores.json").read_text())
    assert {score["measure"] for score in report["scores"]} == {"my_choice", "my_sums", "python", "gsm8k"}
    assert {score["model"] for score in report["scores"]} == {"backbone", "2 beams", "4 beams", "p2", "p4"}
    assert parscale(*second)[0] == 0
    assert "model-index" in (place / "runs" / "p4" / "README.md").read_text()
    assert "model-index" not in (place / "runs" / "p2" / "README.md").read_text()


def test_the_commands_for_programs_run(scored, parscale, place):
    tests = TESTS | {"plus_input": []}
    settings = yaml.safe_load(blocks("yaml")[1])
    (entry,) = settings["code"]
    entry["path"] = entry["path"].removesuffix(".gz")
    (place / entry["path"]).write_text("".join(json.dumps(problem | tests) + "\n" for problem in PROBLEMS))
    common = {"backbone": str(scored.root / "backbone"), "output_dir": "runs/code", "max_code_tokens": 4}
    (place / "code.yaml").write_text(yaml.safe_dump(settings | common))
    stand_in = place / "evalplus" / "bin" / "python"
    stand_in.parent.mkdir(parents=True)
    script = STAND_IN.replace('"samples-sanitized.jsonl"]', '"samples-sanitized.jsonl", "--base_only"]')
    stand_in.write_text(script.replace("SEEN", repr(str(place / "seen.json"))))
    stand_in.chmod(0o755)
    (command,) = commands(blocks("bash")[1])
    code, out, err = parscale(*command)
    assert code == 0, err
    assert "pass@10 (base)" in out
    assert "plus" not in [
        score["metric"] for score in json.loads((place / "runs/code/scores.json").read_text())["scores"]
    ]


def test_the_ready_files_are_settings():
    found = sorted((REPOSITORY / "recipes" / "configs" / "evaluate").glob("*.yaml"))
    assert {path.stem for path in found} == {"beams", "code", "demo", "paper"}
    for path in found:
        settings = read_settings(path)
        assert settings.output_dir.startswith("runs/scores-")
        first = path.read_text().splitlines()[0]
        assert path.stem == "demo" or str(path.relative_to(REPOSITORY)) in first


def test_the_tasks_of_the_ready_files_are_known_to_lm_eval():
    lm_eval = pytest.importorskip("lm_eval")
    (folder,) = lm_eval.__path__
    names = {
        entry if isinstance(entry, str) else entry["name"]
        for path in (REPOSITORY / "recipes" / "configs" / "evaluate").glob("*.yaml")
        for entry in yaml.safe_load(path.read_text()).get("tasks", [])
    }
    assert len(names) == 10
    folders = ("winogrande", "hellaswag", "openbookqa", "piqa", "arc", "sciq", "mmlu/default", "gsm8k", "ifeval")
    texts = [
        path.read_text() for part in folders for path in REPOSITORY.joinpath(folder, "tasks", part).glob("*.yaml")
    ]
    defined = {name for text in texts for name in re.findall(r"^(?:task|group): (\S+)$", text, re.MULTILINE)}
    assert names <= defined


@pytest.mark.slow
def test_the_recipe_runs_by_its_arguments_alone(recipes, material, tmp_path):
    """As without arguments, on a backbone that is there already."""
    result = recipes.run(
        "evaluate", tmp_path / "out", backbone=material.backbone, dtype="float32", limit=3, max_length=128
    ).check()
    report = json.loads((result.output_dir / "scores.json").read_text())
    assert [(score["measure"], score["kind"]) for score in report["scores"]] == [
        ("source", "text"),
        ("docstrings", "forgetting"),
    ]
    assert "docstrings (forgetting)" in result.stdout()
    refused = recipes.run("evaluate", tmp_path / "other", backbone="/nowhere/at/all")
    assert refused.exit_code == 1
    assert refused.errors() == [
        "error: There is no folder /nowhere/at/all: give one that is here, or the name of a repository on the hub."
    ]
