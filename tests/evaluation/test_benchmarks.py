"""Scores of lm-eval's tasks: those of lm-eval itself, for adapters and their exports, in any batch size, and by beam search."""

import json

import pytest
import torch
from support.scored_material import QUESTIONS, SUMS, TASKS
from transformers import AutoModelForCausalLM, PreTrainedModel

from parscale_adapt.evaluation import EvaluationSettings, evaluate
from parscale_adapt.evaluation.report import report_of


lm_eval = pytest.importorskip("lm_eval", reason="scoring needs `pip install '.[evaluation]'`")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from parscale_adapt.evaluation.scoring_model import BeamLM  # noqa: E402


MODELS = ["backbone", "P2", "P4"]


def values_of(evaluation):
    """Scores by measure, metric and model."""
    return {(row.measure, row.metric, row.contender.name): row.score.value for row in evaluation.rows}


def items_of(folder, model, measure):
    (path,) = (folder / "scores" / model).glob(f"{measure}.*.json")
    return json.loads(path.read_text())["items"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluated") / "out"


@pytest.fixture(scope="module")
def loads():
    """How many backbones were loaded by `evaluated`."""
    return []


@pytest.fixture(scope="module")
def evaluated(scored, folder, loads):
    """Backbone and two adapters on both tasks, in batches of 1."""
    with pytest.MonkeyPatch.context() as patch:
        load = PreTrainedModel.from_pretrained.__func__
        patch.setattr(
            PreTrainedModel,
            "from_pretrained",
            classmethod(lambda cls, *args, **kwargs: loads.append(args) or load(cls, *args, **kwargs)),
        )
        return evaluate(EvaluationSettings(**scored.settings(folder, batch_size=1)))


def lm_evals_own(model, scored, names=TASKS, **options):
    """lm-eval's results and samples of a model in batches of 8, by the code that lm-eval's documentation shows."""
    scorer = HFLM(pretrained=model, tokenizer=scored.tokenizer, batch_size=8)
    manager = TaskManager(include_path=str(scored.tasks), include_defaults=False)
    return lm_eval.simple_evaluate(scorer, tasks=[*names], task_manager=manager, bootstrap_iters=0, **options)


def numbers_of(found):
    return {
        (task, metric): value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if "," in metric and "_stderr" not in metric
    }


def test_scores_are_those_of_lm_eval_for_adapter_and_export_and_alike_in_any_batch_size(scored, evaluated, folder):
    found = values_of(evaluated)
    export = AutoModelForCausalLM.from_pretrained(scored.export, trust_remote_code=True).eval()
    models = {
        "backbone": [scored.plain()],
        "P2": [scored.adapted("two")],
        "P4": [scored.adapted("four"), export],
    }
    for name, alike in models.items():
        for model in alike:
            expected = lm_evals_own(model, scored)
            numbers = numbers_of(expected)
            assert len(numbers) == 4
            for (task, metric), value in numbers.items():
                assert found[task, metric, name] == pytest.approx(value, abs=1e-9), (name, task, metric)
            answers = [sample["resps"][0][0] for sample in expected["samples"]["local_sums"]]
            assert [item["answer"] for item in items_of(folder, name, "local_sums")] == answers
    assert len({found["local_sums", "letters,none", name] for name in MODELS}) == 3  # the models do differ


def test_all_models_are_scored_on_one_backbone_in_memory(evaluated, loads):
    assert evaluated.contenders[2].source is not None
    assert len(loads) == 1


def test_batches_of_8_give_the_scores_of_batches_of_1(scored, evaluated, tmp_path):
    again = evaluate(EvaluationSettings(**scored.settings(tmp_path / "out", batch_size=8)))
    assert values_of(again) == pytest.approx(values_of(evaluated), abs=1e-9)


def test_each_score_has_an_interval_and_each_pair_of_models_a_difference(evaluated):
    report = report_of(evaluated)
    assert {score["model"] for score in report["scores"]} == {*MODELS}
    for score in report["scores"]:
        low, high = score["interval"]
        assert low <= score["value"] <= high
        assert score["num_items"] == len(QUESTIONS if score["measure"] == "local_choice" else SUMS)
    by_name = {(score["metric"], score["model"]): score["value"] for score in report["scores"]}
    pairs = [one for one in report["differences"] if one["metric"] == "letters,none"]
    assert [(one["model"], one["minus"]) for one in pairs] == [("P2", "backbone"), ("P4", "backbone"), ("P4", "P2")]
    for one in pairs:
        expected = by_name["letters,none", one["model"]] - by_name["letters,none", one["minus"]]
        assert one["value"] == pytest.approx(expected)
        assert one["interval"][0] <= one["value"] <= one["interval"][1]


def test_a_group_has_the_score_that_lm_eval_gives_it(scored, tmp_path):
    settings = scored.settings(
        tmp_path / "out", tasks=["local_all", "local_sums"], adapters=[f"P4={scored.root / 'four'}"]
    )
    evaluation = evaluate(EvaluationSettings(**settings))
    expected = lm_evals_own(scored.adapted("four"), scored, ["local_all"])
    assert values_of(evaluation)["local_all", "acc,none", "P4"] == expected["results"]["local_all"]["acc,none"]
    assert [row.measure for row in evaluation.rows if row.contender.name == "P4"][:2] == ["local_all", "local_sums"]
    row = next(row for row in evaluation.rows if row.measure == "local_all")
    assert row.score.num_items == len(QUESTIONS) + 3
    assert row.score.interval is not None


def test_the_number_of_examples_is_that_of_the_settings(scored, tmp_path):
    tasks = [{"name": "local_sums", "num_fewshot": 3}]
    evaluation = evaluate(EvaluationSettings(**scored.settings(tmp_path / "out", tasks=tasks, adapters=[], limit=4)))
    expected = lm_evals_own(scored.plain(), scored, ["local_sums"], num_fewshot=3, limit=4)
    prompts = [sample["arguments"][0][0] for sample in expected["samples"]["local_sums"]]
    assert all(prompt.count("Q:") == 4 for prompt in prompts)
    answers = [sample["resps"][0][0] for sample in expected["samples"]["local_sums"]]
    assert [item["answer"] for item in items_of(tmp_path / "out", "backbone", "local_sums")] == answers
    assert values_of(evaluation)["local_sums", "letters,none", "backbone"] == pytest.approx(
        expected["results"]["local_sums"]["letters,none"]
    )


def test_a_chat_is_asked_for_as_lm_eval_does(scored, tmp_path):
    changes = {"tasks": ["local_sums"], "adapters": [], "apply_chat_template": True}
    evaluation = evaluate(EvaluationSettings(**scored.settings(tmp_path / "out", **changes)))
    expected = lm_evals_own(scored.plain(), scored, ["local_sums"], apply_chat_template=True)
    samples = expected["samples"]["local_sums"]
    assert all("<|im_start|>user" in sample["arguments"][0][0] for sample in samples)
    answers = [sample["resps"][0][0] for sample in samples]
    assert [item["answer"] for item in items_of(tmp_path / "out", "backbone", "local_sums")] == answers
    value = expected["results"]["local_sums"]["letters,none"]
    assert values_of(evaluation)["local_sums", "letters,none", "backbone"] == pytest.approx(value)


def test_beams_answer_as_generate_does_with_one_prompt_at_a_time(scored, tmp_path):
    """Several prompts, each with several beams, some of which end before others."""
    settings = scored.settings(tmp_path / "out", adapters=[f"P2={scored.root / 'two'}"], beams=[2, 4], batch_size=4)
    evaluation = evaluate(EvaluationSettings(**settings))
    rows = [(row.measure, row.contender.name) for row in evaluation.rows if row.metric == "letters,none"]
    assert rows == [("local_sums", name) for name in ("backbone", "2 beams", "4 beams", "P2")]
    assert not [row for row in evaluation.rows if row.measure == "local_choice" and row.contender.num_beams > 1]
    requests = [sample["arguments"][0][0] for sample in lm_evals_own(scored.plain(), scored)["samples"]["local_sums"]]
    model, tokenizer = scored.plain(), scored.tokenizer
    for number in (2, 4):
        answers = []
        for prompt in requests:
            tokens = tokenizer(prompt, return_tensors="pt").input_ids
            output = model.generate(
                tokens,
                max_new_tokens=6,
                num_beams=number,
                do_sample=False,
                stop_strings=["\n", "Q:"],
                tokenizer=tokenizer,
            )
            answers.append(tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True))
        found = [item["answer"] for item in items_of(tmp_path / "out", f"{number}_beams", "local_sums")]
        assert found == [answer.split("\n")[0].split("Q:")[0] for answer in answers]
        assert found != [item["answer"] for item in items_of(tmp_path / "out", "backbone", "local_sums")]


def test_each_beam_ends_by_itself(scored):
    """The most likely letter ends an answer: beams that wrote it are done, and their prompt's others go on."""
    tokenizer = scored.tokenizer
    scorer = BeamLM(pretrained=scored.plain(), tokenizer=tokenizer, batch_size=2)
    scorer.num_beams = 3
    prompts = [tokenizer(text, return_tensors="pt").input_ids[0] for text in ("while True", "import os")]
    width = max(map(len, prompts))
    context = torch.full((2, width), tokenizer.pad_token_id)
    for row, prompt in enumerate(prompts):
        context[row, width - len(prompt) :] = prompt
    mask = (context != tokenizer.pad_token_id).long()
    free = scorer._model_generate(context, width + 8, stop=[], attention_mask=mask)[:, width:]
    stop = tokenizer.decode(free[0, 2:4])
    together = scorer._model_generate(context, width + 8, stop=[stop], attention_mask=mask)[:, width:]
    for row, prompt in enumerate(prompts):
        alone = scorer._model_generate(
            prompt[None], len(prompt) + 8, stop=[stop], attention_mask=torch.ones_like(prompt)[None]
        )
        texts = [
            tokenizer.decode(found, skip_special_tokens=True) for found in (together[row], alone[0, len(prompt) :])
        ]
        assert texts[0] == texts[1]
