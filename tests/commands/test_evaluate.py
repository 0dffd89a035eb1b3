"""`parscale evaluate`: what it leaves behind, and bad input in one sentence before weights load."""

import importlib.util
import inspect
import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from support.scored_material import ScoredMaterial


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    return ScoredMaterial(tmp_path_factory.mktemp("scored"))


@pytest.fixture
def never_loads(monkeypatch):
    """Fails where weights would be read."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were about to be loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)


def refused(parscale, config, *options):
    code, _, err = parscale("evaluate", config, *options)
    assert code == 1, err
    (line,) = [line for line in err.splitlines() if line.startswith("parscale: ")]
    assert err.splitlines()[-1] == line
    assert "Traceback" not in err
    return line


BAD = [
    ({"taks": ["x"]}, "has the unknown key 'taks': choose among backbone, adapters, tasks"),
    ({"tasks": []}, "`task_folders` holds tasks, but `tasks` names none"),
    ({"tasks": [], "task_folders": []}, "Nothing is to be measured: name `tasks`, `texts`, `forgetting` or `code`."),
    ({"tasks": "local_choice"}, "`tasks` must be a list, got 'local_choice'."),
    ({"tasks": [{"name": "local_sums", "fewshot": 5}]}, "An entry of `tasks` has the unknown key 'fewshot'"),
    ({"tasks": [{"name": "local_sums", "num_fewshot": -1}]}, "`num_fewshot` of local_sums must be a whole number"),
    ({"tasks": [{"name": "local_choice", "num_fewshot": 2}]}, "The task local_choice is defined without examples"),
    ({"tasks": ["local_sums", "local_sums"]}, "The task local_sums comes twice in `tasks`: name it once."),
    ({"task_folders": ["/nowhere"]}, "`task_folders` names /nowhere, where no folder is"),
    ({"backbone": None}, "No `backbone` is named"),
    ({"backbone": "/nowhere/at/all"}, "There is no folder /nowhere/at/all"),
    ({"adapters": ["/nowhere/at/all"]}, "There is no folder /nowhere/at/all"),
    ({"texts": ["own=/nowhere.jsonl"]}, "/nowhere.jsonl"),
    ({"texts": [{"name": "own", "file": "x"}]}, "An entry of `texts` has the unknown key 'file'"),
    ({"texts": [{"name": 2024, "path": "x"}]}, "`name` of an entry of `texts` must be text, got {'name': 2024"),
    ({"texts": [{"path": ["x"]}]}, "`path` of an entry of `texts` must be text"),
    ({"forgetting": [{"path": "x", "split": 5}]}, "`split` of an entry of `forgetting` must be text"),
    ({"adapters": [f"{'a' * 101}=x"]}, "A name in `adapters` has more than 100 characters"),
    ({"beams": [1]}, "`beams` must name different numbers of at least 2, got [1]"),
    ({"beams": [2], "tasks": ["local_choice"]}, "`beams` needs a task whose answers are written"),
    ({"limit": 0}, "`limit` must be at least 1, got 0: leave it out to score all items."),
    ({"batch_size": "8"}, "`batch_size` must be a whole number, got '8'."),
    ({"dtype": "int3"}, "`dtype` must be auto, float32, bfloat16 or float16, got 'int3'."),
    ({"execute_code": "/bin/true"}, "`execute_code` runs the programs of `code`, which names none"),
    ({"code": ["fizzbuzz=/nowhere"]}, "An entry of `code` must be called humaneval or mbpp, got 'fizzbuzz'."),
    ({"code": ["humaneval=/nowhere.jsonl"]}, "`code` names /nowhere.jsonl, where no file is"),
    ({"code": ["humaneval=/nowhere"], "execute_code": "/nowhere/python"}, "must name the Python of an environment"),
]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs `pip install '.[evaluation]'`")
@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input_is_one_sentence_before_weights_load(scored, parscale, tmp_path, never_loads, changes, message):
    assert message in refused(parscale, scored.write_config(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_text_without_a_token_to_predict_is_refused(scored, parscale, tmp_path, never_loads):
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n{"text": ""}\n')
    config = scored.write_config(tmp_path / "out", tasks=[], task_folders=[], texts=[f"own={path}"])
    assert "holds no token to predict, its documents are empty: give text for `own`" in refused(parscale, config)


def test_an_adapter_of_another_backbone_is_refused_by_its_files(scored, parscale, tmp_path, request):
    foreign = scored.foreign_backbone()
    request.getfixturevalue("never_loads")
    config = scored.write_config(tmp_path / "out", backbone=str(foreign), tasks=[], task_folders=[], texts=["own=x"])
    message = refused(parscale, config)
    assert f"The adapter {scored.root / 'two'} does not belong to {foreign}" in message
    assert "its weights differ" in message


def test_a_backbone_with_streams_of_its_own_is_refused(scored, parscale, tmp_path, never_loads):
    message = refused(parscale, scored.write_config(tmp_path / "out", backbone=str(scored.export), adapters=[]))
    assert "`backbone` must be a plain checkpoint" in message
    assert "standalone" in message


def test_a_chat_without_template_is_refused(scored, parscale, tmp_path, never_loads):
    folder = tmp_path / "silent"
    shutil.copytree(scored.root / "backbone", folder)
    (folder / "chat_template.jinja").unlink()
    config = scored.write_config(tmp_path / "out", backbone=str(folder), adapters=[], apply_chat_template=True)
    assert "`apply_chat_template` needs a tokenizer with a chat template" in refused(parscale, config)


@pytest.mark.parametrize("text", ["- a list", "a: [", "just words"])
def test_a_file_that_is_no_mapping_is_refused(parscale, tmp_path, text):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    assert f"{config} " in refused(parscale, config)


def test_without_lm_eval_the_extra_is_named(scored, parscale, tmp_path, never_loads, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    message = refused(parscale, scored.write_config(tmp_path / "out"))
    assert "`tasks` needs lm-eval, which is not installed: pip install 'parscale_adapt[evaluation]'" in message


def test_unknown_tasks_and_tasks_of_the_hub_are_refused_offline(scored, parscale, tmp_path, never_loads, monkeypatch):
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager, _index

    # To look through all of lm-eval's own tasks takes half a minute.
    own, found = Path(inspect.getfile(TaskManager)).parent, _index.TaskIndex._iter_yaml_files
    monkeypatch.setattr(
        _index.TaskIndex,
        "_iter_yaml_files",
        staticmethod(lambda root: found(root / "hellaswag" if root == own else root)),
    )
    config = scored.write_config(tmp_path / "out", tasks=["hellaswog"])
    assert (
        "lm-eval knows no task 'hellaswog', and `task_folders` holds none of that name: did you mean hellaswag"
        in refused(parscale, config)
    )
    message = refused(parscale, scored.write_config(tmp_path / "out", tasks=["hellaswag"]))
    assert "The task hellaswag can't be loaded: this machine is offline" in message
    assert "give a task with local data" in message


def test_table_json_picture_and_cards(scored, parscale, tmp_path):
    for name in ("two", "four"):
        shutil.copytree(scored.root / name, tmp_path / name)
    card = "---\nlibrary_name: peft\ntags:\n- mine\n---\n\n# Words of my own\n"
    (tmp_path / "two" / "README.md").write_text(card)
    (tmp_path / "four" / "README.md").unlink()
    settings = scored.settings(
        tmp_path / "out",
        adapters=[f"P2={tmp_path / 'two'}", f"P4={tmp_path / 'four'}"],
        tasks=[],
        task_folders=[],
        texts=[f"own={scored.text}"],
        forgetting=[f"other={scored.other}"],
    )
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    for _ in range(2):  # the second time, scores are replaced and not doubled
        code, out, err = parscale("evaluate", config, "--write-cards")
        assert code == 0, err
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    by_name = {(score["measure"], score["model"]): score for score in report["scores"]}
    assert (tmp_path / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")
    for (measure, model), score in by_name.items():
        line = next(line for line in out.splitlines() if model in line and f"{score['value']:.4f}" in line)
        assert f"{score['interval'][0]:.4f} to {score['interval'][1]:.4f}" in line, (measure, model)
    assert "other (forgetting)" in out
    for name, folder in (("P2", "two"), ("P4", "four")):
        loaded = ModelCard.load(tmp_path / folder / "README.md")
        results = {one.dataset_name: one for one in loaded.data.eval_results}
        assert len(loaded.data.eval_results) == 2
        assert results["own"].metric_value == by_name["own", name]["value"]
        assert results["own"].metric_type == "loss (nats per token)"
        assert results["other"].metric_args["interval_95"] == by_name["other", name]["interval"]
    text = (tmp_path / "two" / "README.md").read_text()
    assert "# Words of my own" in text
    assert "- mine" in text
    assert "model-index:" in text


def test_options_replace_what_the_file_says(scored, parscale, tmp_path):
    config = scored.write_config(tmp_path / "out", tasks=[], task_folders=[], texts=[f"own={scored.text}"])
    code, _, err = parscale(
        "evaluate", config, "--adapter", f"mine={scored.root / 'four'}", "--output-dir", tmp_path / "other"
    )
    assert code == 0, err
    report = json.loads((tmp_path / "other" / "scores.json").read_text())
    assert [model["name"] for model in report["models"]] == ["backbone", "mine"]
    assert not (tmp_path / "out").exists()
