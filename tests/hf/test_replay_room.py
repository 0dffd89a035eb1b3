"""Layers of a replayed chunk keep their activations where a loss over whole logits left room, and nowhere else."""

import copy

import pytest
import torch
from support.memory import LiveTensors
from support.tiny_models import random_tokens, tiny_model, with_streams

from parscale_adapt.hf.replay_room import ReplayRoom


NUM_STREAMS, NUM_LAYERS, NUM_TOKENS = 4, 4, 48


def checkpointed(chunk_size=1, vocab_size=4000, **fields):
    backbone = tiny_model(vocab_size=vocab_size, num_hidden_layers=NUM_LAYERS)
    model = with_streams(backbone, NUM_STREAMS, stream_chunk_size=chunk_size, **fields)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def step(model, run=None):
    model.zero_grad()
    ids = random_tokens(2, NUM_TOKENS)
    loss = (run or model)(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def runs_of_layers(model):
    """How often each layer has run since it was read last."""
    counts = [0] * NUM_LAYERS

    for index, layer in enumerate(model.get_base_model().model.layers):

        def see(*args, index=index):
            counts[index] += 1

        layer.self_attn.register_forward_pre_hook(see, with_kwargs=True)

    def read():
        seen, counts[:] = counts[:], [0] * NUM_LAYERS
        return seen

    return read


def room_of(model):
    return model.get_base_model().model.parscale.replay_room


@pytest.mark.parametrize("fields", [{}, {"train_backbone": True}], ids=["frozen", "full"])
def test_layers_that_have_room_run_once_less_with_the_same_gradients(fields):
    model = checkpointed(**fields)
    read = runs_of_layers(model)
    first = step(model)
    nested = read()
    # Each chunk, each but the last again, and every layer of all once more for itself.
    assert nested == [3 * NUM_STREAMS - 1] * NUM_LAYERS
    second = step(model)
    assert read() == [2 * NUM_STREAMS] * NUM_LAYERS
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    step(model)
    assert read() == [2 * NUM_STREAMS] * NUM_LAYERS


def test_without_whole_logits_every_layer_is_checkpointed_again():
    model = checkpointed()
    read = runs_of_layers(model)
    for _ in range(2):
        decoder, ids = model.get_base_model().model, random_tokens(2, NUM_TOKENS)
        decoder(input_ids=ids, use_cache=False).last_hidden_state.square().sum().backward()
        assert read() == [3 * NUM_STREAMS - 1] * NUM_LAYERS
    step(model)
    read()
    step(model)
    assert read() == [2 * NUM_STREAMS] * NUM_LAYERS


def test_logits_without_gradients_make_no_room():
    model = checkpointed()
    read = runs_of_layers(model)
    decoder, ids = model.get_base_model().model, random_tokens(2, NUM_TOKENS)
    for _ in range(2):
        decoder(input_ids=ids, use_cache=False).last_hidden_state.square().sum().backward()
        read()
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        model.eval()(input_ids=ids, use_cache=False)
        model.train()
        read()
    decoder(input_ids=ids, use_cache=False).last_hidden_state.square().sum().backward()
    assert read() == [3 * NUM_STREAMS - 1] * NUM_LAYERS


@pytest.mark.parametrize("fields", [{}, {"train_backbone": True}], ids=["frozen", "full"])
@pytest.mark.parametrize(("vocab_size", "chunk_size"), [(500, 1), (1000, 1), (2000, 1), (4000, 1), (2000, 2)])
def test_the_peak_of_a_step_stays_the_one_at_its_loss(vocab_size, chunk_size, fields):
    model, peaks = checkpointed(chunk_size, vocab_size, **fields), []
    for _ in range(3):
        model.zero_grad()
        with LiveTensors() as tensors:
            step(model)
        peaks.append(tensors.peak)
    assert peaks[1] == peaks[2] <= 1.02 * peaks[0]


def test_what_a_layer_keeps_for_its_backward_pass_is_measured():
    """And a few tensors more: those that live where the replay stops."""
    model = checkpointed()
    step(model)
    room = room_of(model)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage()._cdata, t) is None or t, lambda t: t
    ):
        layer = model.get_base_model().model.layers[0]
        layer._gradient_checkpointing_func = lambda run, *args: run(*args)
        states = torch.randn(2, NUM_TOKENS, 32, requires_grad=True)
        model.set_stream_chunk_size(None)
        chunk = slice(0, 1)
        with model.get_base_model().model.parscale._running_chunk(chunk):
            positions = torch.arange(NUM_TOKENS)[None]
            rotary = model.get_base_model().model.rotary_emb(states, positions)
            layer(states, position_embeddings=rotary, position_ids=positions, attention_mask=None)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    given = parameters | {tensor.untyped_storage()._cdata for tensor in (states, *rotary)}
    expected = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in given)
    assert expected <= room.bytes_per_token * 2 * NUM_TOKENS <= 1.4 * expected


def test_compiled_layers_keep_their_gradients():
    model = checkpointed()
    expected = step(model)
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="aot_eager")
    room_of(model).__init__()
    for _ in range(3):
        torch.testing.assert_close(step(model), expected)


def test_a_copy_has_room_of_its_own_and_a_removed_adapter_leaves_no_hook():
    model = checkpointed()
    step(model)
    twin = copy.deepcopy(model)
    room_of(twin).logits_bytes = 0
    step(model)
    assert room_of(twin).logits_bytes == 0
    step(twin)
    assert room_of(twin).logits_bytes == room_of(model).logits_bytes == 4 * 2 * NUM_TOKENS * 4000
    lm_head = model.get_base_model().lm_head
    assert lm_head._forward_hooks
    model.unload()
    assert not lm_head._forward_hooks


def test_room_is_what_three_tensors_like_the_logits_take_less_what_replays_need():
    room = ReplayRoom()
    room.num_layers, room.num_tokens, room.bytes_of_states, room.bytes_per_token = 10, 100, 1000, 50.0
    for logits_bytes, gradient_bytes, checkpointed_layers in (
        (0, 0, 10),
        (4000, 0, 10),
        (6000, 0, 8),
        (6000, 5000, 9),
        (90000, 0, 0),
    ):
        room.logits_bytes = logits_bytes
        assert room.begin_step(8, 1, gradient_bytes) == checkpointed_layers
        assert room.logits_bytes == 0
    room.logits_bytes = 6000
    assert room.begin_step(8, 2, 0) == 9
