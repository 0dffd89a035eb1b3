"""What PEFT's generic tests ask of every method that trains, asked of LoRA and of ParScale alike.

The list of what is asked and what is not stands in `test_peft_conformance_running.py`.
"""

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from support.outputs import close
from support.peft_methods import CASES, METHODS, adapted, config, scores, tensors_of, trainable
from support.tiny_models import random_tokens, tiny_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_generates_and_trains_as_float32_does(method, dtype):
    reference = adapted(method)
    model = adapted(method, dtype=dtype)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    found = scores(model, attention_mask=mask)
    assert found.isfinite().all()
    close(found[:, 0].float(), scores(reference, attention_mask=mask)[:, 0], 0.35)
    tokens = random_tokens()
    losses = [one(input_ids=tokens, labels=tokens).loss for one in (model, reference)]
    for loss in losses:
        loss.backward()
    close(losses[0].float(), losses[1], 0.05)
    names = sorted(trainable(model))
    gradients = [
        torch.cat([one.get_parameter(name).grad.float().flatten() for name in names]) for one in (model, reference)
    ]
    assert torch.cosine_similarity(*gradients, 0) > (0.999 if dtype == torch.float16 else 0.9)


@pytest.mark.parametrize(("model_type", "method"), CASES)
def test_training_moves_the_adapter_and_nothing_else_and_lowers_the_loss(model_type, method):
    model = adapted(method, model_type)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tokens = random_tokens()
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.003)
    loss_before = model.eval()(input_ids=tokens, labels=tokens).loss
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    parameters = dict(model.named_parameters())
    with_gradient = {name for name, parameter in parameters.items() if parameter.grad is not None}
    assert with_gradient == tensors_of(model, "default")
    assert {name for name, tensor in before.items() if not torch.equal(tensor, parameters[name])} == with_gradient
    assert model.eval()(input_ids=tokens, labels=tokens).loss < loss_before


@pytest.mark.parametrize(
    ("model_type", "method", "use_reentrant"),
    [*((*case, True) for case in CASES), *(("qwen2", method, False) for method in METHODS)],
)
def test_gradient_checkpointing_changes_no_gradient(model_type, method, use_reentrant):
    tokens = random_tokens()
    found = []
    for checkpointing in (False, True):
        model = adapted(method, model_type).train()
        if checkpointing:
            model.prepare_model_for_gradient_checkpointing(model)
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            assert model.is_gradient_checkpointing
        model(input_ids=tokens, labels=tokens).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == tensors_of(model, "default")
    for name, gradient in found[0].items():
        close(found[1][name], gradient, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_a_backbone_prepared_for_quantized_training_trains(method, dtype):
    backbone = prepare_model_for_kbit_training(tiny_model().to(dtype))
    assert trainable(backbone) == set()
    model = get_peft_model(backbone, config(method)).train()
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(random_tokens()).requires_grad
    model(input_ids=random_tokens(), labels=random_tokens()).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == tensors_of(model, "default")
