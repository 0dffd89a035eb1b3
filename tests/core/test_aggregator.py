import math

import pytest
import torch
from support.oracle import mix_by_hand

from parscale_adapt.core.aggregator import AGGREGATORS, DynamicAggregator, MeanAggregator, StaticAggregator


P, B, T, H = 3, 2, 5, 8


def aggregator_and_states(dtype=torch.float32):
    aggregator = DynamicAggregator(H, P, smoothing=0.1)
    aggregator.reset_parameters(0.5)
    for linear in (aggregator[0], aggregator[2]):
        torch.nn.init.normal_(linear.bias)
    return aggregator, torch.randn(P * B, T, H).to(dtype)


def mixed_by_hand(aggregator, hidden_states):
    tensors = {f"parscale_aggregator.{name}": tensor for name, tensor in aggregator.state_dict().items()}
    return mix_by_hand(list(hidden_states.float().view(P, B, T, H)), tensors, aggregator.smoothing)


def test_it_equals_the_mixture_computed_by_hand():
    aggregator, hidden_states = aggregator_and_states()
    torch.testing.assert_close(aggregator(hidden_states), mixed_by_hand(aggregator, hidden_states))


def test_its_tensors_have_the_published_names_and_shapes():
    shapes = {name: tuple(tensor.shape) for name, tensor in DynamicAggregator(H, P, 0.1).state_dict().items()}
    assert shapes == {"0.weight": (H, P * H), "0.bias": (H,), "2.weight": (P, H), "2.bias": (P,)}


def test_it_starts_normal_with_biases_at_zero():
    aggregator = DynamicAggregator(64, 4, 0.1)
    aggregator.reset_parameters(0.02)
    assert aggregator[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert aggregator[2].weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not aggregator[0].bias.any()
    assert not aggregator[2].bias.any()


def test_without_weights_every_stream_counts_the_same():
    aggregator, hidden_states = aggregator_and_states()
    for parameter in aggregator.parameters():
        torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(aggregator(hidden_states), hidden_states.view(P, B, T, H).mean(0))


def test_smoothing_keeps_every_stream_in_the_gradient():
    aggregator, hidden_states = aggregator_and_states()
    torch.nn.init.zeros_(aggregator[2].weight)
    aggregator[2].bias.data = torch.tensor([200.0, 0.0, 0.0])  # a collapsed aggregator
    hidden_states.requires_grad_(True)
    aggregator(hidden_states).sum().backward()
    torch.testing.assert_close(hidden_states.grad[B:], torch.full_like(hidden_states[B:], 0.1 / P))


def test_weights_are_recorded_on_request_and_detached():
    aggregator, hidden_states = aggregator_and_states()
    aggregator(hidden_states)
    assert aggregator.last_weights is None
    aggregator.record_weights = True
    mixed = aggregator(hidden_states)
    assert aggregator.last_weights.shape == (B, T, P)
    assert not aggregator.last_weights.requires_grad
    by_stream = hidden_states.view(P, B, T, H)
    expected = sum(aggregator.last_weights[..., stream, None] * by_stream[stream] for stream in range(P))
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_states_are_mixed_by_a_float32_aggregator(autocast):
    aggregator, hidden_states = aggregator_and_states(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mixed = aggregator(hidden_states)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), mixed_by_hand(aggregator, hidden_states), atol=0.05, rtol=0.05)


def static_aggregator():
    aggregator = StaticAggregator(H, P, smoothing=0.1)
    aggregator.weight_logits.data = torch.tensor([1.0, -0.5, 0.25])
    return aggregator


def test_static_weights_are_the_same_for_every_token():
    aggregator, hidden_states = static_aggregator(), torch.randn(P * B, T, H)
    shares = [math.exp(logit) for logit in (1.0, -0.5, 0.25)]
    weights = [share / sum(shares) * 0.9 + 0.1 / 3 for share in shares]
    expected = sum(weight * stream for weight, stream in zip(weights, hidden_states.view(P, B, T, H)))
    torch.testing.assert_close(aggregator(hidden_states), expected)
    torch.testing.assert_close(aggregator(hidden_states), mixed_by_hand(aggregator, hidden_states))


def test_static_weights_start_equal_and_are_learned():
    aggregator, hidden_states = StaticAggregator(H, P, smoothing=0.1), torch.randn(P * B, T, H)
    aggregator.reset_parameters(0.5)
    torch.testing.assert_close(aggregator(hidden_states), hidden_states.view(P, B, T, H).mean(0))
    aggregator(hidden_states).square().sum().backward()
    assert aggregator.weight_logits.grad.all()
    assert aggregator.weight_logits.grad.sum().item() == pytest.approx(0, abs=1e-3)  # softmax ignores a common shift


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mean_has_no_parameters(smoothing):
    aggregator, hidden_states = MeanAggregator(H, P, smoothing), torch.randn(P * B, T, H)
    aggregator.reset_parameters(0.5)
    assert not list(aggregator.parameters())
    torch.testing.assert_close(aggregator(hidden_states), hidden_states.view(P, B, T, H).mean(0))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_aggregator_records_its_weights_and_keeps_the_type_of_the_states(name):
    aggregator = AGGREGATORS[name](H, P, 0.1)
    aggregator.reset_parameters(0.5)
    aggregator.record_weights = True
    hidden_states = torch.randn(P * B, T, H).bfloat16()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mixed = aggregator(hidden_states)
        assert mixed.dtype == torch.bfloat16
        assert aggregator.last_weights.dtype == torch.float32
        assert aggregator.last_weights.shape == (B, T, P)
        torch.testing.assert_close(aggregator.last_weights.sum(-1), torch.ones(B, T))
