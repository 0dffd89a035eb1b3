import itertools

import pytest
import torch
import trl
from packaging.version import Version
from peft import PeftModel, get_peft_model
from support.tiny_models import random_tokens, tiny_model, with_streams
from support.trainers import rows_of_uneven_lengths, trainer_of, word_tokenizer
from trl import SFTTrainer

from parscale_adapt import ParScaleConfig


def batch():
    """Three samples, the first left-padded."""
    input_ids, mask = random_tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    input_ids[0, :4] = mask[0, :4] = 0
    return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("num_streams", [1, 2, 4, 8])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral"])
def test_every_tensor_of_the_adapter_gets_a_finite_gradient_that_is_not_zero(model_type, num_streams):
    backbone = tiny_model(model_type)
    model = get_peft_model(
        backbone, ParScaleConfig(task_type="CAUSAL_LM", num_streams=num_streams, num_prefix_tokens=3)
    )
    loss = model(**batch()).loss
    assert loss.isfinite()
    adapter = {name for name in trainable(model) if "parscale" in name}
    assert len(adapter) == (0 if num_streams == 1 else 8)
    assert trainable(model) == adapter
    if adapter:
        loss.backward()
    found = gradients(model)
    assert set(found) == adapter
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        by_stream = gradient.flatten(1).abs().sum(1) if "prefix" in name else gradient.abs().sum().reshape(1)
        assert (by_stream > 0).all(), name


def two_steps(model):
    """Losses and gradients of two steps of gradient descent."""
    model.train()
    results = []
    for _ in range(2):
        model.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model)})
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter -= 0.05 * parameter.grad
    return results


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "fields", [{}, {"train_backbone": True}, {"init_weights": "reparameterized"}], ids=["frozen", "full", "mlp"]
)
@pytest.mark.parametrize("model_type", ["qwen2", "mistral", "gpt2"])
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(model_type, fields, use_reentrant):
    plain = with_streams(tiny_model(model_type), **fields)
    expected = two_steps(plain)
    model = with_streams(tiny_model(model_type), **fields)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    calls = []
    layer = next(module for name, module in model.named_modules() if name.endswith(("layers.0", "h.0")))
    layer.register_forward_pre_hook(lambda module, args: calls.append(module.gradient_checkpointing))
    found = two_steps(model)
    assert len(calls) >= 2  # twice as often where the hook runs in the recomputation too
    assert all(calls)
    for step, reference in zip(found, expected):
        assert set(step) == trainable(model) | {"loss"}
        for name in reference:
            torch.testing.assert_close(step[name], reference[name], atol=1e-5, rtol=1e-5, msg=name)
    assert not torch.equal(expected[0]["loss"], expected[1]["loss"])


@pytest.mark.parametrize("train_backbone", [False, True])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["autocast", "half precision", "half precision under autocast"],
)
def test_low_precision_gives_finite_gradients_near_those_of_float32(dtype, autocast, train_backbone):
    reference = with_streams(tiny_model(), train_backbone=train_backbone)
    expected = reference(**batch()).loss
    expected.backward()
    model = with_streams(tiny_model().to(dtype), train_backbone=train_backbone)
    assert {p.dtype for name, p in model.named_parameters() if "parscale" in name} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch()).loss
    loss.backward()
    torch.testing.assert_close(loss.float(), expected, atol=0.1, rtol=0)
    found, wanted = gradients(model), gradients(reference)
    assert set(found) == trainable(model) == set(wanted)
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        assert torch.cosine_similarity(gradient.float().flatten(), wanted[name].flatten(), 0) > 0.9, name


@pytest.mark.parametrize("num_streams", [1, 2])
def test_the_loss_of_a_packed_row_is_the_token_weighted_loss_of_its_documents(num_streams):
    model = with_streams(tiny_model(), num_streams).train()
    documents = [random_tokens(1, length, seed=length) for length in (7, 2, 4)]
    losses = [model(input_ids=document, labels=document, use_cache=False).loss for document in documents]
    weights = torch.tensor([document.shape[1] - 1.0 for document in documents])
    labels = torch.cat(documents, 1)
    for start in (0, 7, 9):
        labels[0, start] = -100
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents]).unsqueeze(0)
    packed = model(input_ids=torch.cat(documents, 1), position_ids=positions, labels=labels, use_cache=False).loss
    torch.testing.assert_close(packed, (torch.stack(losses) * weights).sum() / weights.sum(), atol=1e-5, rtol=1e-5)


def parameters_after(trainer):
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize("train_backbone", [False, True])
def test_a_batch_of_eight_trains_like_eight_batches_of_one(tmp_path, train_backbone):
    before = dict(with_streams(tiny_model(), train_backbone=train_backbone).named_parameters())
    after = [
        parameters_after(trainer_of(with_streams(tiny_model(), train_backbone=train_backbone), tmp_path, **options))
        for options in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8})
    ]
    for name in before:
        torch.testing.assert_close(after[0][name], after[1][name], atol=1e-6, rtol=1e-5, msg=name)
    changed = {name for name in before if not torch.equal(before[name], after[0][name])}
    assert {name for name in changed if "parscale" not in name} == (
        {name for name in before if "parscale" not in name} if train_backbone else set()
    )
    assert {name for name in before if "parscale" in name} <= changed


def test_the_default_loss_of_trl_calls_the_decoder_and_equals_the_loss_of_the_model(tmp_path):
    model = with_streams(tiny_model())
    trainer = trainer_of(model, tmp_path)
    rows, heads = [], []
    backbone = model.get_base_model()
    backbone.model.register_forward_hook(lambda module, args, output: rows.append(output.last_hidden_state.shape[:2]))
    backbone.model.layers[0].register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:2]))
    backbone.lm_head.register_forward_pre_hook(lambda module, args: heads.append(args[0].shape[:2]))
    inputs = next(iter(trainer.get_train_dataloader()))
    fused = trainer.compute_loss(model, dict(inputs))
    assert rows == [(16, 13), (8, 13)]
    assert heads == []  # TRL reads the head's weight itself, on the decoder's 8 rows
    keys = ("input_ids", "attention_mask", "labels")
    plain = model(**{key: inputs[key] for key in keys if key in inputs})
    # Before 1.16, TRL replaces the LM head's call whenever labels are given.
    assert heads == ([(8, 13)] if Version(trl.__version__) >= Version("1.16") else [])
    torch.testing.assert_close(fused, plain.loss, atol=1e-5, rtol=1e-5)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for first, second in zip(*(torch.autograd.grad(loss, parameters) for loss in (fused, plain.loss))):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_trl_trains_under_gradient_checkpointing_as_without(tmp_path, use_reentrant):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    plain, checkpointed = (
        parameters_after(trainer_of(with_streams(tiny_model()), tmp_path, **changes)) for changes in ({}, options)
    )
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], atol=1e-6, rtol=1e-5, msg=name)


def test_trl_attaches_streams_itself_and_its_saved_checkpoint_is_complete(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    arguments = trainer_of(with_streams(tiny_model()), tmp_path, **options).args
    trainer = SFTTrainer(
        tiny_model(),
        arguments,
        train_dataset=rows_of_uneven_lengths(),
        processing_class=word_tokenizer(),
        peft_config=ParScaleConfig(task_type="CAUSAL_LM", num_streams=2, num_prefix_tokens=3),
    )
    trainer.train()
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "checkpoint-1")
    saved, live = dict(reloaded.named_parameters()), dict(trainer.model.named_parameters())
    names = [name for name in live if "parscale" in name]
    assert len(names) == 8
    assert all(torch.equal(saved[name], live[name]) for name in names)


def test_a_frozen_run_leaves_every_tensor_of_the_backbone_byte_identical(tmp_path):
    backbone = tiny_model()
    before = {name: tensor.numpy().tobytes() for name, tensor in backbone.state_dict().items()}
    model = with_streams(backbone)
    parameters_after(trainer_of(model, tmp_path, max_steps=2, optim="adamw_torch", weight_decay=0.1))
    after = model.unload().state_dict()
    assert list(after) == list(before)
    assert all(after[name].numpy().tobytes() == value for name, value in before.items())


def test_dropout_of_the_backbone_is_on_in_training_and_off_in_evaluation():
    model = with_streams(tiny_model(attention_dropout=0.5)).train()
    losses = {round(model(**batch()).loss.item(), 6) for _ in range(3)}
    assert len(losses) == 3
    model.eval()
    first, second = (model(**batch()).loss for _ in range(2))
    assert torch.equal(first, second)


def test_two_adapters_train_one_after_the_other_without_touching_each_other():
    model = with_streams(tiny_model())
    model.add_adapter("other", ParScaleConfig(task_type="CAUSAL_LM", num_streams=4, num_prefix_tokens=3))
    for active, idle in itertools.permutations(["default", "other"]):
        model.set_adapter(active)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        two_steps(model)
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
        assert moved == {name for name in before if f".{active}." in name}
        assert not any(f".{idle}." in name for name in moved)
