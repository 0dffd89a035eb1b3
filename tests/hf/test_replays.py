"""What happens between the forward pass of chunks of streams and the backward pass, which runs them once more."""

from functools import partial

import pytest
import torch
from support.tiny_models import random_tokens, tiny_model, with_second_adapter, with_streams
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)


def streams(num_streams=3, **changes):
    return with_streams(tiny_model(**changes), num_streams, stream_chunk_size=1).double().train()


def loss_of(model, **inputs):
    return model(**{"input_ids": random_tokens(), "labels": random_tokens(seed=3), **inputs}).loss


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def gradients_at_once(model, **inputs):
    model.set_stream_chunk_size(None)
    loss_of(model, **inputs).backward()
    return gradients(model)


def test_another_active_adapter_is_refused_though_it_has_the_same_shapes():
    model = streams()
    with_second_adapter(model, 3).double().train()
    loss = loss_of(model)
    model.set_adapter("second")
    with pytest.raises(
        ValueError, match=r"while the adapter 'default' is active, .* not the adapter 'second', or set"
    ):
        loss.backward()
    model.set_adapter("default")
    loss = loss_of(model)
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="not the plain backbone, or set `stream_chunk_size`"),
    ):
        loss.backward()


def test_switching_there_and_back_and_a_new_adapter_change_no_gradient():
    model = streams()
    expected = gradients_at_once(model)
    model.set_stream_chunk_size(1)
    loss = loss_of(model)
    with_second_adapter(model, 3).double()
    model.set_adapter("second")
    with torch.no_grad():
        loss_of(model)
    model.set_adapter("default")
    loss.backward()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-12)


def test_parameters_that_were_replaced_for_the_forward_pass_alone_are_refused():
    model = streams()
    others = {name: (1.3 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    inputs = {"input_ids": random_tokens(), "labels": random_tokens()}
    loss = torch.func.functional_call(model, others, kwargs=inputs).loss
    with pytest.raises(
        ValueError, match="the decoder has other parameters now than in its forward pass: call `backward`"
    ):
        loss.backward()


@pytest.mark.parametrize("checkpoints", [False, True])
def test_dropout_draws_the_same_though_the_model_is_in_evaluation_mode_by_then(checkpoints):
    model, found = streams(attention_dropout=0.3), []
    if checkpoints:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for evaluates in (False, True):
        torch.manual_seed(0)
        loss = loss_of(model.train())
        model.train(not evaluates)
        loss.backward()
        assert all(module.training != evaluates for module in model.modules())
        found.append(gradients(model))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", list(CheckpointImpl))
def test_layers_in_checkpoint_wrappers_of_torch_run_again_for_their_chunk(kind):
    model = streams()
    expected = gradients_at_once(model)
    model.enable_input_require_grads()
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=kind),
        check_fn=lambda module: module in set(model.get_base_model().model.layers),
    )
    for size in (1, 2):
        model.set_stream_chunk_size(size)
        loss_of(model).backward()
        found = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in gradients(model).items()}
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("use_cache", [None, False])
def test_packed_documents_are_told_apart_as_by_all_streams_at_once(use_cache):
    """Which is where no cache is made, as in transformers."""
    model, ids = streams(), random_tokens(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": use_cache}
    expected = gradients_at_once(model, **inputs)
    model.set_stream_chunk_size(1)
    loss_of(model, **inputs).backward()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-12)
