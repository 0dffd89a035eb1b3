import pytest
import torch
from support.oracle import file_tensors, mix_by_hand
from support.tiny_models import random_tokens, tiny_model, with_streams

from parscale_adapt import ParScaleConfig
from parscale_adapt.tuner import start


P, N = 2, 4


@pytest.fixture
def texts(monkeypatch):
    """The texts that the streams start from, instead of generated ones."""
    tokens = random_tokens(P, N, seed=5)
    monkeypatch.setattr(start, "generate_tokens", lambda model, num_rows, num_tokens: tokens[:num_rows, :num_tokens])
    return tokens


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "position"), [("qwen2", -N), ("gemma3_text", -N), ("gpt2", 0)])
def test_prefixes_start_as_what_the_backbone_caches_for_the_text_of_their_stream(texts, model_type, position):
    positions = torch.arange(position, position + N).expand(P, -1)
    expected = tiny_model(model_type)(input_ids=texts, position_ids=positions, use_cache=True).past_key_values
    model = with_streams(tiny_model(model_type), P, num_prefix_tokens=N, init_weights="tokens")
    found = [tensor for name, tensor in file_tensors(model).items() if "prefix" in name]
    assert len(found) == 4
    for layer in range(2):
        torch.testing.assert_close(found[2 * layer], expected.layers[layer].keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[2 * layer + 1], expected.layers[layer].values, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_a_stream_starts_as_the_backbone_after_its_text(texts, model_type):
    input_ids = random_tokens()
    model = with_streams(tiny_model(model_type), P, num_prefix_tokens=N, init_weights="tokens")
    backbone = tiny_model(model_type)
    hidden_states = []
    for text in texts:
        after_text = torch.cat([text.expand(2, -1), input_ids], 1)
        hidden_states.append(backbone.model(after_text, use_cache=False).last_hidden_state[:, N:])
    expected = backbone.lm_head(mix_by_hand(hidden_states, file_tensors(model), smoothing=0.1))
    torch.testing.assert_close(model(input_ids=input_ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_prefix_tokens", [1, 7])
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2"])
def test_the_backbone_generates_another_text_for_every_stream(model_type, num_prefix_tokens):
    model = with_streams(
        tiny_model(model_type), num_streams=4, num_prefix_tokens=num_prefix_tokens, init_weights="tokens"
    )
    prefix = next(tensor for name, tensor in file_tensors(model).items() if name.endswith("parscale_prefix_k"))
    assert prefix.shape[2] == num_prefix_tokens
    assert all((prefix[0] - prefix[stream]).abs().max() > 1e-3 for stream in (1, 2, 3))


def test_a_second_adapter_starts_from_the_plain_backbone(texts):
    fields = {"num_streams": P, "num_prefix_tokens": N, "init_weights": "tokens"}
    alone = with_streams(tiny_model(), **fields)
    model = with_streams(tiny_model(), num_streams=4)
    model.add_adapter("second", ParScaleConfig(task_type="CAUSAL_LM", **fields))
    assert model.get_base_model().model.parscale.current_adapter == "default"
    model.set_adapter("second")
    expected = {name: tensor for name, tensor in file_tensors(alone).items() if "prefix" in name}
    found = file_tensors(model)
    assert expected
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_starting_from_tokens_keeps_the_mode_of_every_module():
    backbone = tiny_model().train()
    backbone.lm_head.eval()
    states = start.observe_token_states(backbone, P, N)
    assert set(states) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert backbone.training
    assert backbone.model.training
    assert not backbone.lm_head.training


def test_a_start_that_fails_leaves_the_backbone_as_it_was(monkeypatch):
    def fail(*args):
        raise RuntimeError("no text")

    monkeypatch.setattr(start, "generate_tokens", fail)
    backbone = tiny_model()
    names = list(backbone.state_dict())
    with pytest.raises(RuntimeError, match="no text"):
        with_streams(backbone, init_weights="tokens")
    assert backbone.config._attn_implementation == "sdpa"
    assert list(backbone.state_dict()) == names


def test_streams_are_switched_off_inside_the_block_only():
    model = with_streams(tiny_model())
    layer = model.get_base_model().model.parscale
    with start.streams_off(model):
        assert layer.num_streams == 1
    assert layer.num_streams == 2
    with model.disable_adapter():
        with start.streams_off(model):
            assert layer.num_streams == 1
        assert layer.num_streams == 1
