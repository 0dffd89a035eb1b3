"""A loss or gradient that is not finite stops the run before it spoils anything."""

import itertools

import pytest
import torch
from peft import PeftModel
from support.tiny_models import tiny_model, with_streams
from support.trainers import rows_of_uneven_lengths, word_tokenizer
from trl import SFTConfig, SFTTrainer

from parscale_adapt.training import StreamTrainer, train
from parscale_adapt.training.failures import TrainingStopped
from parscale_adapt.training.finiteness import NonFiniteError


def stream_trainer(folder, **options):
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, "max_length": None, "disable_tqdm": True}
    settings |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "steps", "save_steps": 1}
    return StreamTrainer(
        with_streams(tiny_model()),
        SFTConfig(output_dir=str(folder), gradient_checkpointing=False, **{**settings, **options}),
        train_dataset=rows_of_uneven_lengths(),
        processing_class=word_tokenizer(),
    )


def spoil_losses(trainer, value, at):
    compute_loss, calls = trainer.compute_loss, itertools.count()

    def spoiled(model, inputs, *args, **kwargs):
        loss = compute_loss(model, inputs, *args, **kwargs)
        return loss + value if next(calls) == at else loss

    trainer.compute_loss = spoiled


def spoil_gradient(trainer, value, at):
    """Of a tensor in the middle of the model, in one step."""
    calls = itertools.count()
    name = next(name for name, _ in trainer.model.named_parameters() if "layers.1" in name and "parscale" in name)
    parameter = dict(trainer.model.named_parameters())[name]
    parameter.register_hook(lambda gradient: gradient * value if next(calls) == at else gradient)
    return name


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def saved_weights(trainer, step):
    model = PeftModel.from_pretrained(tiny_model(), f"{trainer.args.output_dir}/checkpoint-{step}")
    return {name: p for name, p in model.named_parameters() if "parscale" in name}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_stops_the_run_at_its_step(tmp_path, value, accumulation):
    trainer = stream_trainer(tmp_path, gradient_accumulation_steps=accumulation)
    spoil_losses(trainer, value, at=2 * accumulation)
    with pytest.raises(TrainingStopped) as stopped:
        train(trainer, None)
    text = str(stopped.value)
    assert "stopped after step 2 by NonFiniteError: the loss is not finite in step 3" in text
    assert f"the last verified checkpoint is {tmp_path}/checkpoint-2" in text
    assert "`--adapter_name_or_path`" in text
    expected = saved_weights(trainer, 2)
    assert all(torch.equal(expected[name], value) for name, value in weights(trainer).items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_is_named_before_it_changes_a_weight(tmp_path, value, max_grad_norm):
    trainer = stream_trainer(tmp_path, max_grad_norm=max_grad_norm)
    name = spoil_gradient(trainer, value, at=1)
    with pytest.raises(TrainingStopped) as stopped:
        train(trainer, None)
    assert f"the gradient of {name} is not finite in step 2, before the weights were changed" in str(stopped.value)
    expected = saved_weights(trainer, 1)
    assert all(torch.equal(expected[key], tensor) for key, tensor in weights(trainer).items())


def test_of_several_gradients_the_nearest_to_the_loss_is_named(tmp_path):
    trainer = stream_trainer(tmp_path, save_strategy="no")

    def spoil(module, args, output):
        output.register_hook(lambda gradient: gradient * float("nan"))

    trainer.model.get_base_model().model.layers[1].register_forward_hook(spoil)
    with pytest.raises(
        NonFiniteError, match=r"the gradient of \S+layers\.1\.\S+ \(and of \d+ tensors before it\) is not"
    ):
        trainer.train()


@pytest.mark.parametrize(("scale", "stops"), [(2.0**16, False), (0.5, True)])
def test_an_overflow_that_a_loss_scale_provoked_is_skipped_by_the_scaler(tmp_path, scale, stops):
    trainer = stream_trainer(tmp_path, save_strategy="no", max_grad_norm=0.0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    spoil_gradient(trainer, float("inf"), at=1)
    model = trainer.model
    inputs = next(iter(trainer.get_train_dataloader()))
    for step in (1, 2):
        trainer.model.zero_grad()
        trainer._finite.add(trainer.compute_loss(model, dict(inputs)))
        trainer.accelerator.scaler.scale(trainer.compute_loss(model, dict(inputs))).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if step == 2 and stops:
            with pytest.raises(NonFiniteError, match="the gradient of "):
                trainer._finite.check(step, model, norm)
        else:
            trainer._finite.check(step, model, norm)
    assert not norm.isfinite()


def test_a_loss_that_no_scale_can_help_stops_under_a_scaler_too(tmp_path):
    trainer = stream_trainer(tmp_path)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer._finite.add(torch.tensor(float("nan")))
    with pytest.raises(NonFiniteError, match="the loss is not finite in step 7"):
        trainer._finite.check(7, trainer.model, torch.tensor(float("nan")))


def test_losses_and_norm_are_as_transformers_computes_them(tmp_path):
    histories = []
    for kind in (StreamTrainer, SFTTrainer):
        trainer = stream_trainer(tmp_path, save_strategy="no", logging_steps=1, max_grad_norm=0.1)
        if kind is SFTTrainer:
            trainer._clip_grad_norm = lambda model, trainer=trainer: SFTTrainer._clip_grad_norm(trainer, model)
            trainer._get_grad_norm = lambda *args, trainer=trainer, **more: SFTTrainer._get_grad_norm(
                trainer, *args, **more
            )
        torch.manual_seed(0)
        trainer.train()
        histories.append([(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e])
    assert len(histories[0]) == 4
    assert histories[0] == histories[1]
