"""Teacher and student on one backbone: the loss and the gradients are those of two models, the memory that of one."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from support.tiny_models import random_tokens, tiny_model, with_streams
from support.trainers import word_tokenizer

from parscale_adapt import ParScaleConfig
from parscale_adapt.training import StreamDistillationConfig, StreamDistillationTrainer


STUDENTS = {
    "two_streams": {"num_streams": 2},
    "lora": {"num_streams": 1, "lora": LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)},
}


def two_adapters(student):
    model = with_streams(tiny_model(), **STUDENTS[student])
    torch.manual_seed(3)
    model.add_adapter("teacher", ParScaleConfig(num_streams=4, num_prefix_tokens=3, init_std=0.5))
    return model


def trainer_of(model, folder, **options):
    rows = [
        {
            "prompt": random_tokens(1, n, seed=n)[0].tolist(),
            "completion_ids": random_tokens(1, 9 - n, seed=9 + n)[0].tolist(),
        }
        for n in (3, 6)
    ]
    settings = {
        "train_on_data": True,
        "beta": 0.0,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "shuffle_dataset": False,
        **options,
    }
    return StreamDistillationTrainer(
        model=model,
        teacher="teacher",
        args=StreamDistillationConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(),
    )


def divergence_of_two_models(student, teacher, rows):
    """The forward divergence over the answers' tokens, row by row without padding."""
    total, count = 0, 0
    for row in rows:
        ids = torch.tensor([row["prompt"] + row["completion_ids"]])
        answers = slice(len(row["prompt"]) - 1, -1)
        learned = student(ids).logits[0, answers].log_softmax(-1)
        with torch.no_grad():
            taught = teacher(ids).logits[0, answers].log_softmax(-1)
        total = total + (taught.exp() * (taught - learned)).sum()
        count += len(row["completion_ids"])
    return total / count


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("student", STUDENTS)
def test_one_backbone_learns_as_two_models_would(tmp_path, student, checkpointed):
    trainer = trainer_of(two_adapters(student), tmp_path, gradient_checkpointing=checkpointed)
    learner, teacher = two_adapters(student), two_adapters(student)
    teacher.set_adapter("teacher")
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    loss = divergence_of_two_models(learner, teacher, trainer.train_dataset)
    loss.backward()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    for name, parameter in learner.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 1e-6:
            after = dict(trainer.model.named_parameters())[name]
            torch.testing.assert_close(before[name] - after, parameter.grad, rtol=1e-3, atol=1e-5)
            assert name in changed
            changed.remove(name)
    assert not any("teacher" in name or "embed_tokens" in name for name in changed)
    assert trainer.model.active_adapters == ["default"]
    assert not any(
        parameter.requires_grad for name, parameter in trainer.model.named_parameters() if "teacher" in name
    )


def test_teacher_and_student_take_the_memory_of_one_backbone(tmp_path):
    backbone = bytes_of(tiny_model())
    model = two_adapters("two_streams")
    trainer = trainer_of(model, tmp_path)
    adapters = sum(p.nbytes for name, p in model.named_parameters() if "parscale_" in name)
    trainer.train()
    assert bytes_of(trainer.model, trainer.teacher_model) == backbone + adapters


def bytes_of(*models):
    """Of all storages behind the parameters, each once."""
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for one in models for p in one.parameters()
    }
    return sum(storages.values())


def test_a_trained_backbone_is_refused(tmp_path):
    model = with_streams(tiny_model(), train_backbone=True)
    with pytest.raises(ValueError, match="distill into a frozen one"):
        trainer_of(model, tmp_path)
