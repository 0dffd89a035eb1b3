"""lm_eval scores an adapter and its export alike, in any batch size, offline."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from support.chat_material import VOCABULARY, ChatMaterial
from support.recipe_runs import environment
from support.tiny_models import with_streams
from transformers import AutoModelForCausalLM


lm_eval = pytest.importorskip("lm_eval", reason="scoring needs `pip install '.[evaluation]'`")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402


TEXTS = [
    "def hello(x):\n    return x",
    "for line in text",
    "a",
    "the quick brown fox",
    "import os, sys",
    "x = 1",
]
CHOICES = [[" + 1", " y", "\n"], [" pass", "\n    print(line)", " x"], ["b", "bb", "c"]]
CHOICES = [*CHOICES, [" jumps", " sleeps", "."], ["\n", ", re", ""], ["\ny = 2", " + 1", "0"]]
CASES = [(text, choice) for text, choices in zip(TEXTS, CHOICES) for choice in choices if choice]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
SECONDS = 200


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return ChatMaterial(tmp_path_factory.mktemp("lm_eval"))


@pytest.fixture(scope="module")
def tasks(material):
    """Local tasks: choose among three continuations, and the perplexity of texts."""
    folder = material.root / "tasks"
    folder.mkdir()
    choices = [{"text": text, "choices": list(three), "label": 0} for text, three in zip(TEXTS, CHOICES)]
    common = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0}
    described = {
        "local_choice": (
            [row for row in choices if all(row["choices"])],
            {
                "output_type": "multiple_choice",
                "doc_to_text": "{{text}}",
                "doc_to_choice": "choices",
                "doc_to_target": "label",
                "target_delimiter": "",
                "metric_list": [{"metric": "acc"}],
            },
        ),
        "local_perplexity": (
            [{"text": text * 3} for text in TEXTS],
            {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "byte_perplexity"}],
            },
        ),
    }
    for name, (rows, fields) in described.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **files, **fields}))
    return folder


def log_likelihoods(model, tokenizer, batch_size):
    """(sum of log probabilities, whether greedy) of each case, as lm_eval finds them."""
    scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    requests = [Instance("loglikelihood", {}, case, index) for index, case in enumerate(CASES)]
    return scorer.loglikelihood(requests, disable_tqdm=True)


@torch.no_grad()
def expected_log_likelihoods(model, tokenizer):
    """The same from one forward for each case, without padding."""
    expected = []
    for context, continuation in CASES:
        tokens = tokenizer(context + continuation, return_tensors="pt").input_ids
        num_context = len(tokenizer(context).input_ids)
        assert tokens[0, :num_context].tolist() == tokenizer(context).input_ids
        log_probs = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
        wanted = tokens[0, num_context:]
        own = log_probs[num_context - 1 :].gather(1, wanted[:, None])
        expected.append((own.sum().item(), bool((log_probs[num_context - 1 :].argmax(-1) == wanted).all())))
    return expected


def test_log_likelihoods_are_those_of_the_model_in_any_batch_size_for_adapter_and_export(material):
    adapter, tokenizer = material.adapted("four"), material.tokenizer
    export = AutoModelForCausalLM.from_pretrained(material.export, trust_remote_code=True).eval()
    expected = expected_log_likelihoods(adapter, tokenizer)
    for model in (adapter, export):
        for batch_size in (1, 8):
            found = log_likelihoods(model, tokenizer, batch_size)
            assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    with adapter.disable_adapter():
        plain = log_likelihoods(adapter, tokenizer, 8)
    assert max(abs(one[0] - other[0]) for one, other in zip(plain, expected)) > 0.1


def figures_of(results, samples):
    """Accuracy, perplexity, and each log-likelihood."""
    responses = [response for sample in samples for response in sample["filtered_resps"]]
    values = [float(response[0] if isinstance(response, list | tuple) else response) for response in responses]
    assert len(values) > len(TEXTS)
    return results["local_choice"]["acc,none"], results["local_perplexity"]["byte_perplexity,none"], values


def evaluate(model, tasks, **options):
    """What the command runs, on our tasks alone, since to read the thousands that come with it takes its time."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = ["local_choice", "local_perplexity"]
    found = lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, **options)
    return figures_of(found["results"], [sample for name in names for sample in found["samples"][name]])


@pytest.fixture(scope="module")
def in_memory(material, tasks):
    """The adapter on its backbone, scored as an object in memory."""
    scorer = HFLM(pretrained=material.adapted("four"), tokenizer=material.tokenizer, batch_size=8)
    return evaluate(scorer, tasks)


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1], rel=1e-5)
    assert len(found[2]) == len(expected[2])
    assert found[2] == pytest.approx(expected[2], abs=1e-4)


@pytest.mark.slow
def test_the_command_scores_an_export_without_this_package(material, tasks, in_memory, tmp_path):
    arguments = [
        *("run", "--model", "hf", "--device", "cpu", "--batch_size", "1"),
        *("--model_args", f"pretrained={material.export},trust_remote_code=True,dtype=float32"),
        *("--tasks", "local_choice,local_perplexity", "--include_path", str(tasks)),
        *("--output_path", str(tmp_path / "out"), "--log_samples"),
    ]
    blocked = (
        "import sys; sys.modules['parscale_adapt'] = None; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    )
    variables = environment() | OFFLINE | {"HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(
        [sys.executable, "-c", blocked, *arguments], env=variables, capture_output=True, text=True, timeout=SECONDS
    )
    assert result.returncode == 0, result.stderr[-4000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    files = sorted((tmp_path / "out").rglob("samples_*.jsonl"))
    samples = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert_same(figures_of(json.loads(results.read_text())["results"], samples), in_memory)


def test_peft_as_model_argument_puts_an_adapter_on_its_backbone(material, tasks, in_memory):
    model_args = f"pretrained={material.root / 'backbone'},peft={material.root / 'four'},dtype=float32"
    assert_same(evaluate("hf", tasks, model_args=model_args, batch_size=8, device="cpu"), in_memory)


def test_peft_as_model_argument_resizes_a_padded_vocabulary_and_is_then_refused(material, tasks, tmp_path):
    """lm_eval cuts the embeddings to the tokenizer's size, which is another backbone than the adapter's."""
    folder = tmp_path / "padded"
    shutil.copytree(material.root / "backbone", folder)
    model = material.plain()
    model.resize_token_embeddings(VOCABULARY + 8)
    model.save_pretrained(folder)
    with_streams(AutoModelForCausalLM.from_pretrained(folder), 2).save_pretrained(tmp_path / "adapter")
    model_args = f"pretrained={folder},peft={tmp_path / 'adapter'},dtype=float32"
    with pytest.raises(ValueError, match="The adapter was trained on another backbone"):
        evaluate("hf", tasks, model_args=model_args, device="cpu")
