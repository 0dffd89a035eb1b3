import pytest
import torch
from oracle import mix_by_hand

from parscale_adapt.aggregator import DynamicAggregator


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
