"""The diversity term in training: what it adds to the loss, its gradient, and that streams become less alike."""

import math

import pytest
import torch
from support.tiny_models import random_tokens, tiny_model, with_streams
from support.trainers import rows_of_uneven_lengths, trainer_of, word_tokenizer

from parscale_adapt import final_stream_states, stream_decorrelation
from parscale_adapt.core.aggregator import Aggregator
from parscale_adapt.training import StreamConfig, StreamTrainer


def stream_trainer(model, folder, **options):
    defaults = trainer_of(with_streams(tiny_model()), folder).args
    kept = ("max_grad_norm", "logging_steps", "use_cpu", "bf16", "max_length", "lr_scheduler_type", "optim")
    settings = {name: getattr(defaults, name) for name in kept}
    settings |= {"save_strategy": "no", "report_to": "none", "gradient_checkpointing": False, "disable_tqdm": True}
    settings |= {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 0.5, **options}
    rows = rows_of_uneven_lengths()
    arguments = StreamConfig(output_dir=str(folder), **settings)
    return StreamTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=word_tokenizer())


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def batch():
    """Three samples, the first padded on the right."""
    ids, mask = random_tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    ids[0, 5:] = mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("num_streams", [2, 3])
def test_the_states_are_those_that_the_aggregator_mixes_and_nothing_is_kept(num_streams):
    model = with_streams(tiny_model(), num_streams)
    seen = []
    (aggregator,) = (module for module in model.modules() if isinstance(module, Aggregator))
    hook = aggregator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with final_stream_states(model) as states:
        model(**batch())
        with torch.no_grad():
            model(**batch())
        (found,) = states
    hook.remove()
    assert found.shape == (num_streams, 3, 9, 32)
    assert torch.equal(found.flatten(0, 1), seen[0])
    assert found.requires_grad
    assert not states
    model(**batch())
    assert not states
    assert not aggregator._forward_pre_hooks


def loss_and_gradients(model, weight):
    with final_stream_states(model) as states:
        loss = model(**batch()).loss
        loss = loss + weight * stream_decorrelation(states[-1], batch()["attention_mask"])
    parameters = trained(model)
    return loss, dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(use_reentrant):
    model = with_streams(tiny_model()).train()
    plain_loss, plain = loss_and_gradients(model, 0.0)
    loss, expected = loss_and_gradients(model, 10.0)
    assert loss > plain_loss + 0.01
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    loss_again, found = loss_and_gradients(model, 10.0) if not use_reentrant else reentrant_gradients(model)
    torch.testing.assert_close(loss_again, loss, atol=1e-6, rtol=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
        if "prefix" in name:
            assert not torch.allclose(gradient, plain[name], rtol=1e-2)


def reentrant_gradients(model):
    """By `backward`, the only way that reentrant checkpoints know."""
    with final_stream_states(model) as states:
        loss = model(**batch()).loss
        loss = loss + 10.0 * stream_decorrelation(states[-1], batch()["attention_mask"])
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in trained(model).items()}


def changes(folder, model, **options):
    """What one step of plain gradient descent changes, and its log."""
    before = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    trainer = stream_trainer(model, folder, **options)
    trainer.train()
    after = {name: parameter.detach() - before[name] for name, parameter in trained(model).items()}
    return after, trainer.state.log_history[0]


def micro_batches(folder, size):
    return list(
        stream_trainer(with_streams(tiny_model()), folder, per_device_train_batch_size=size).get_train_dataloader()
    )


@pytest.mark.parametrize(("size", "num_micro_batches"), [(8, 1), (4, 2), (2, 4)])
def test_a_step_adds_the_mean_over_its_micro_batches(tmp_path, size, num_micro_batches):
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": num_micro_batches}
    plain, plain_log = changes(tmp_path, with_streams(tiny_model()), **options)
    found, log = changes(tmp_path, with_streams(tiny_model()), diversity_weight=3.0, **options)
    model = with_streams(tiny_model()).train()
    terms = []
    for inputs in micro_batches(tmp_path, size):
        with final_stream_states(model) as states:
            model(**inputs)
            terms.append(stream_decorrelation(states[-1], inputs["attention_mask"]))
    assert len(terms) == num_micro_batches
    mean = torch.stack(terms).mean()
    assert log["stream_decorrelation"] == pytest.approx(mean.item(), rel=1e-3)
    assert log["loss"] == pytest.approx(plain_log["loss"] + 3.0 * mean.item(), abs=1e-3)
    assert "stream_decorrelation" not in plain_log
    parameters = trained(model)
    gradients = torch.autograd.grad(mean, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients):
        expected = plain[name] - (0 if gradient is None else 0.5 * 3.0 * gradient)
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-3, msg=name)
    assert not any(gradient is None for name, gradient in zip(parameters, gradients) if "prefix" in name)


def correlation_after(folder, **options):
    model = with_streams(tiny_model())
    trainer = stream_trainer(model, folder, max_steps=30, optim="adamw_torch", learning_rate=3e-2, **options)
    trainer.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    with final_stream_states(model) as states:
        model(**inputs)
        value = stream_decorrelation(states[-1], inputs["attention_mask"]).item()
    return value, trainer


def test_streams_become_less_alike_and_what_is_held_out_does_not_count_it(tmp_path):
    without, _ = correlation_after(tmp_path)
    value, trainer = correlation_after(tmp_path, diversity_weight=10.0)
    assert value < 0.8 * without
    logged = [entry["stream_decorrelation"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1] < 0.8 * logged[0]
    heldout = trainer.heldout_loss()
    trainer._diversity_weight = 0.0
    assert trainer.heldout_loss() == heldout
    assert "eval_stream_decorrelation" not in trainer.evaluate()


def test_one_stream_has_none_to_differ_from(tmp_path):
    model = with_streams(tiny_model(), 1, train_backbone=True)
    with pytest.raises(ValueError, match=r"`diversity_weight` is 0\.1, but only one stream runs in this model"):
        stream_trainer(model, tmp_path, diversity_weight=0.1)
    with pytest.raises(ValueError, match="no streams to compare"), final_stream_states(model):
        pass


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_a_weight_is_finite_and_not_negative(tmp_path, weight):
    with pytest.raises(ValueError, match="`diversity_weight` must be a finite number of at least 0, got"):
        StreamConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, diversity_weight=weight)
