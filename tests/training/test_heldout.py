"""`heldout_loss` and `eval_loss` are the cross-entropy of the next token, whatever is minimized."""

import math
import sys
import types

import pytest
import torch
from support.tiny_models import tiny_model, with_streams
from support.trainers import rows_of_uneven_lengths, word_tokenizer
from trl import SFTConfig

from parscale_adapt.training import StreamTrainer


pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL will drop some of these options
]
OPTIONS = {
    "nll": {"loss_type": "nll"},
    "chunked_nll": {"loss_type": "chunked_nll"},
    "dft": {"loss_type": "dft"},
    "label smoothing": {"loss_type": "nll", "label_smoothing_factor": 0.3},
    "neftune": {"neftune_noise_alpha": 50.0},
    "a batch of 3": {"per_device_eval_batch_size": 3},
    "accumulation": {"gradient_accumulation_steps": 2},
}


def stream_trainer(folder, model=None, **options):
    settings = {"per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 0.1, "max_length": None}
    settings |= {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    rows = rows_of_uneven_lengths()
    return StreamTrainer(
        model or with_streams(tiny_model()),
        SFTConfig(output_dir=str(folder), gradient_checkpointing=False, **{**settings, **options}),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=word_tokenizer(),
    )


@torch.no_grad()
def cross_entropy_row_by_row(trainer):
    """Written out: the logits of each row, a softmax, the logarithm of what the next token got."""
    model, total, count = trainer.model.eval(), 0.0, 0
    for row in trainer.eval_dataset:
        (logits,) = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits.double()
        for position, token in enumerate(row["input_ids"][1:]):
            total -= math.log(torch.softmax(logits[position], -1)[token])
            count += 1
    return total / count


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_the_cross_entropy_for_every_loss_that_is_minimized(tmp_path, options):
    trainer = stream_trainer(tmp_path, **options)
    trainer.train()
    found = trainer.heldout_loss()
    assert found == pytest.approx(cross_entropy_row_by_row(trainer), abs=1e-5)


@pytest.mark.parametrize("coefficient", [None, 5.0])
def test_the_loss_of_a_router_is_no_part_of_it(tmp_path, coefficient):
    model = with_streams(tiny_model("qwen3_moe", output_router_logits=True, router_aux_loss_coef=1.0))
    trainer = stream_trainer(tmp_path, model, router_aux_loss_coef=coefficient)
    trainer.train()
    assert trainer.heldout_loss() == pytest.approx(cross_entropy_row_by_row(trainer), abs=1e-5)
    assert trainer.aux_loss_enabled
    assert model.config.output_router_logits
    assert any(entry.get("aux_loss", 0) > 0 for entry in trainer.state.log_history)


def test_kernels_of_liger_do_not_change_it(tmp_path, monkeypatch):
    """The package needs a GPU; what it replaces in training is stood in for by a loss that is wrong on purpose."""
    applied = []

    def replace_training(model, **kernels):
        applied.append(kernels)

    package = types.SimpleNamespace(transformers=None)
    fake = types.SimpleNamespace(_apply_liger_kernel_to_instance=replace_training)
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", fake)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    trainer = stream_trainer(tmp_path, use_liger_kernel=True)
    trainer.train()
    assert applied
    assert trainer.heldout_loss() == pytest.approx(cross_entropy_row_by_row(trainer), abs=1e-5)


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "cohere"])
def test_scaled_and_capped_logits_are_measured_as_the_model_says_them(tmp_path, model_type):
    changes = {"gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0}, "granite": {"logits_scaling": 3.0}}
    trainer = stream_trainer(tmp_path, with_streams(tiny_model(model_type, "eager", **changes.get(model_type, {}))))
    assert trainer.heldout_loss() == pytest.approx(cross_entropy_row_by_row(trainer), abs=1e-5)


def test_what_is_measured_in_training_is_plain_too_and_training_is_as_before(tmp_path):
    whole = {"per_device_eval_batch_size": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = stream_trainer(tmp_path, loss_type="dft", logging_steps=1, **whole)
    trainer.train()
    (measured,) = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    by_row = []
    for row in trainer.eval_dataset.select(range(8)):
        labels = torch.tensor([row["input_ids"]])
        by_row.append(trainer.model.eval()(input_ids=labels, labels=labels, use_cache=False).loss.item())
    assert measured == pytest.approx(sum(by_row) / len(by_row), abs=1e-5)
    (minimized,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert minimized < 0.5  # dft weighs by the probability, which is small
    assert trainer.args.loss_type == "dft"


def test_rows_without_a_target_are_named(tmp_path):
    trainer = stream_trainer(tmp_path)
    trainer.eval_dataset = trainer.eval_dataset.map(lambda row: {"input_ids": row["input_ids"][:1]}).remove_columns(
        [name for name in trainer.eval_dataset.column_names if name != "input_ids"]
    )
    with pytest.raises(ValueError, match="None of 8 held-out rows has a token to predict"):
        trainer.heldout_loss()
