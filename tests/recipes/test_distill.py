"""Distillation: teacher and student on one backbone, both kinds of answers, kills, and what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from support.recipe_runs import REPOSITORY, check_saved, refusal
from transformers import AutoModelForCausalLM


SAVES = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def teacher(recipes, material):
    """Four streams that sft.py trained on the frozen backbone."""
    options = material.sft_options(num_streams=4, num_prefix_tokens=6, max_steps=8, learning_rate=3e-2)
    return recipes.run("sft", **options).check().output_dir


@pytest.mark.parametrize("train_on_data", [False, True], ids=["own_answers", "data"])
@pytest.mark.parametrize(
    "student",
    [{}, {"num_streams": 1, "lora": '{"r": 4}', "num_prefix_tokens": None}],
    ids=["two_streams", "lora"],
)
def test_a_student_comes_nearer_to_its_teacher(recipes, material, teacher, student, train_on_data):
    """Its divergence on held-out answers falls, and only the student is saved."""
    options = material.distillation_options(
        teacher, train_on_data=train_on_data, gradient_checkpointing=True, **student
    )
    before = recipes.run("distill", **{**options, "learning_rate": 1e-9, "max_steps": 1}).check()
    result = recipes.run("distill", **{**options, "max_steps": 12}).check()
    assert result.metrics["heldout_loss"] < 0.9 * before.metrics["heldout_loss"]
    assert result.metrics["heldout"]["teacher_loss"] == before.metrics["heldout"]["teacher_loss"]
    assert result.metrics["heldout"]["student_loss"] != before.metrics["heldout"]["student_loss"]
    assert result.adapter_config["num_streams"] == student.get("num_streams", 2)
    assert not any("teacher" in name or "embed_tokens" in name for name in result.tensors)
    assert [path for path in result.output_dir.iterdir() if path.is_dir()] == []
    check_saved(result)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(recipes, material, teacher):
    start = {"adapter_name_or_path": teacher, "num_streams": None, "num_prefix_tokens": None, "max_steps": 1}
    result = recipes.run("distill", **material.distillation_options(teacher, **start)).check()
    assert result.losses[0] == pytest.approx(0, abs=1e-6)
    heldout = recipes.run("distill", **material.distillation_options(teacher, **start, learning_rate=1e-9)).check()
    assert heldout.metrics["heldout"]["student_loss"] == pytest.approx(
        heldout.metrics["heldout"]["teacher_loss"], abs=1e-6
    )


@pytest.mark.parametrize("train_on_data", [False, True], ids=["own_answers", "data"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(recipes, material, teacher, tmp_path, train_on_data):
    """Also in its second epoch, whose order is another."""
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(Path(material.questions).read_text().splitlines(keepends=True)[:12]))
    options = material.distillation_options(
        teacher, train_on_data=train_on_data, dataset_name=data, max_steps=6, gradient_accumulation_steps=2, **SAVES
    )
    options |= {"per_device_train_batch_size": 2}
    whole = recipes.run("distill", tmp_path / "whole", **options).check()
    killed = recipes.run("distill", tmp_path / "killed", kill_at_batch=9, **options)
    resumed = recipes.run("distill", tmp_path / "killed", resume_from_checkpoint=True, **options).check()
    assert killed.exit_code == -9
    batches = [[(one["step"], one["ids"], one["loss"]) for one in run.batches()] for run in (whole, killed, resumed)]
    assert len(batches[0]) == 12
    assert {one[1] for one in batches[0][:6]} != {one[1] for one in batches[0][6:]}
    assert batches[1] == batches[0][:9]
    assert batches[2] == batches[0][8:]
    assert resumed.metrics["heldout_loss"] == whole.metrics["heldout_loss"]
    assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in whole.tensors.items())


def test_a_teacher_that_changed_is_refused_when_a_run_goes_on(recipes, material, teacher, tmp_path):
    copied = tmp_path / "teacher"
    shutil.copytree(teacher, copied)
    options = material.distillation_options(copied, **SAVES)
    recipes.run("distill", tmp_path / "run", kill_at_batch=3, **options)
    weights = copied / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    sentence = refusal(recipes.run("distill", tmp_path / "run", resume_from_checkpoint=True, **options))
    assert f"the content of teacher: {copied} is another now" in sentence


def test_a_teacher_of_another_backbone_is_refused(recipes, material, teacher, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(material.backbone)
    model.model.embed_tokens.weight.data += 0.5
    model.save_pretrained(tmp_path)
    material.tokenizer().save_pretrained(tmp_path)
    result = recipes.run("distill", **material.distillation_options(teacher, model_name_or_path=tmp_path))
    sentence = refusal(result)
    assert (
        f"The adapter {teacher} does not belong to {tmp_path}: The adapter was trained on another backbone" in sentence
    )


def test_teachers_that_can_not_share_a_backbone_are_refused(recipes, material, tmp_path):
    full = recipes.run("sft", **material.sft_options(train_backbone=True, max_steps=1)).check().output_dir
    judge = recipes.run("reward", **material.pair_options(max_steps=1)).check().output_dir
    get_peft_model(AutoModelForCausalLM.from_pretrained(material.backbone), LoraConfig()).save_pretrained(tmp_path)
    for teacher, sentence in (
        (full, "carries a trained backbone"),
        (judge, "is an adapter for SEQ_CLS, and only CAUSAL_LM can teach"),
        (tmp_path, "must hold a ParScale adapter, got one of the method LORA"),
        (material.backbone, "must hold a ParScale adapter, got a plain checkpoint"),
        ("./nothing/here", "There is no folder ./nothing/here"),
        (None, "`teacher_model_name_or_path` is missing"),
    ):
        assert sentence in refusal(recipes.run("distill", **material.distillation_options(teacher)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"train_backbone": True},
            "`train_backbone=True` can't be distilled into: teacher and student run on one backbone",
        ),
        ({"num_streams": 1}, "one stream on a frozen backbone has nothing to learn"),
        ({"use_vllm": True}, "`use_vllm` can't sample answers in streams"),
        ({"beta": 1.5}, "beta must be in [0.0, 1.0], got 1.5"),
        ({"train_on": "all_answers"}, "`train_on` must be last_answer in distill.py, got 'all_answers'"),
        ({"max_length": 1}, "`max_length` must be at least 2"),
        ({"teacher_model_revision": "main"}, "`teacher_model_revision` has no effect in distill.py"),
        ({"prompt_field": "question"}, "or `question` and `completion`"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_can_not_work_are_refused(recipes, material, teacher, options, sentence):
    assert sentence in refusal(recipes.run("distill", **material.distillation_options(teacher, **options)))


def test_fewer_questions_than_are_answered_at_a_time_are_refused(recipes, material, teacher):
    result = recipes.run("distill", **material.distillation_options(teacher, per_device_train_batch_size=512))
    assert "and 512 are answered at a time, so that nothing would be trained" in refusal(result, loads_weights=True)


def test_shipped_configurations_are_read_and_run(recipes, material, teacher):
    for config in sorted((REPOSITORY / "recipes" / "configs" / "distill").glob("*.yaml")):
        assert config.read_text().startswith("# accelerate launch")
        keys = yaml.safe_load(config.read_text())
        assert keys["output_dir"].startswith("runs/")
        fields = {"prompt_field": "prompt", "completion_field": "completion"}
        options = material.distillation_options(teacher, config=config, max_steps=1, dtype="float32", **fields)
        recipes.run("distill", **options).check()
