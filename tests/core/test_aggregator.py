import math

import pytest
import torch
from support.memory import NewTensors, bytes_kept_for_backward
from support.oracle import mix_by_hand
from torch.nn import functional as F

from parscale_adapt.core import aggregator as aggregator_module
from parscale_adapt.core.aggregator import (
    AGGREGATORS,
    DynamicAggregator,
    FeatureProjection,
    MeanAggregator,
    StaticAggregator,
)


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


def projection(num_streams, hidden_size, dtype=torch.float64):
    module = FeatureProjection(hidden_size, num_streams)
    torch.nn.init.normal_(module.weight, std=0.3)
    torch.nn.init.normal_(module.bias)
    return module.to(dtype)


def whole_features_projected(by_stream, weight, bias):
    """The published formula: all streams of a token side by side, then a linear layer."""
    features = by_stream.permute(1, 2, 3, 0).flatten(-2)
    return F.linear(features.to(weight.dtype), weight, bias)


def results_and_gradients(function, tensors, mixing):
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    result = function(*tensors)
    return [result, *torch.autograd.grad((result * mixing.to(result.dtype)).sum(), tensors)]


@pytest.fixture
def pieces_of_few_tokens(monkeypatch):
    """Inputs of more than four tokens are cut, which otherwise are only those of more than 1024."""
    monkeypatch.setattr(aggregator_module, "_TOKENS_AT_ONCE", 4)


@pytest.mark.usefixtures("pieces_of_few_tokens")
@pytest.mark.parametrize(("num_streams", "num_tokens", "hidden_size"), [(3, 5, 8), (4, 2, 3), (2, 1, 6), (8, 9, 5)])
def test_the_first_layer_is_linear_in_features_that_never_exist_as_a_whole(num_streams, num_tokens, hidden_size):
    module = projection(num_streams, hidden_size)
    tensors = [torch.randn(num_streams, B, num_tokens, hidden_size).double(), module.weight, module.bias]
    mixing = torch.randn(B, num_tokens, hidden_size)
    found = results_and_gradients(lambda *given: project_with(module, *given), tensors, mixing)
    for one, other in zip(found, results_and_gradients(whole_features_projected, tensors, mixing)):
        torch.testing.assert_close(one, other)


def project_with(module, by_stream, weight, bias):
    return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (by_stream,))


@pytest.mark.usefixtures("pieces_of_few_tokens")
@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias"), ("states",)])
def test_the_first_layer_has_a_gradient_for_whatever_is_trained(frozen):
    module = projection(P, H)
    tensors = {"states": torch.randn(P, B, T, H).double(), **dict(module.named_parameters())}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name not in frozen)
    module(tensors["states"]).square().sum().backward()
    found = {name: tensor.grad for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.grad = None
    whole_features_projected(tensors["states"], module.weight, module.bias).square().sum().backward()
    for name, tensor in tensors.items():
        assert (found[name] is None) == (name in frozen)
        torch.testing.assert_close(found[name], tensor.grad)


@pytest.mark.usefixtures("pieces_of_few_tokens")
def test_the_first_layer_can_be_differentiated_twice():
    module, states = projection(2, 3), torch.randn(2, 1, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda *given: project_with(module, *given), (states, module.weight, module.bias)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states_dtype", [torch.float32, torch.bfloat16])
def test_the_first_layer_is_as_precise_as_whole_features(dtype, states_dtype):
    """Both are compared to float64, over enough tokens for several pieces."""
    num_streams, hidden_size, num_tokens = 8, 32, 600
    weights = projection(num_streams, hidden_size, dtype)
    states = torch.randn(num_streams, B, num_tokens, hidden_size).to(states_dtype)
    tensors, mixing = [states, weights.weight, weights.bias], torch.randn(B, num_tokens, hidden_size)
    exact = results_and_gradients(whole_features_projected, [tensor.double() for tensor in tensors], mixing)
    whole = results_and_gradients(whole_features_projected, tensors, mixing)
    found = results_and_gradients(lambda *given: project_with(weights, *given), tensors, mixing)
    for index, reference in enumerate(exact):
        assert found[index].dtype == whole[index].dtype
        error, allowed = ((other[index].double() - reference).square().mean().sqrt() for other in (found, whole))
        assert error <= 1.01 * allowed + 1e-7 * reference.square().mean().sqrt()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("states_dtype", [torch.float32, torch.bfloat16])
def test_no_copy_of_all_streams_is_made_or_kept(states_dtype, autocast):
    """The largest tensor is one stream in float32, backward the gradient of the states itself."""
    num_streams, num_tokens, hidden_size = 8, 800, 64
    aggregator = DynamicAggregator(hidden_size, num_streams, smoothing=0.1)
    aggregator.reset_parameters(0.5)
    states = torch.randn(num_streams * B, num_tokens, hidden_size).to(states_dtype).requires_grad_()
    bytes_of_one_stream = B * num_tokens * hidden_size * 4
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = bytes_kept_for_backward(lambda: aggregator(states), [states, *aggregator.parameters()])
        with NewTensors(states, *aggregator.parameters()) as forward:
            mixed = aggregator(states)
    with NewTensors() as backward:
        mixed.sum().backward()
    assert kept < 3 * bytes_of_one_stream
    assert max(forward.sizes) <= bytes_of_one_stream
    assert max(backward.sizes) <= states.numel() * states.element_size()


@pytest.mark.slow
def test_the_aggregator_compiles_into_one_graph_whatever_the_number_of_tokens():
    aggregator, _ = aggregator_and_states()
    compiled = torch.compile(aggregator, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (3, 7, 700):
        states = torch.randn(P * B, num_tokens, H)
        given = [states, *aggregator.parameters()]
        mixing = torch.randn(B, num_tokens, H)
        gradients = []
        for run in (aggregator, compiled):
            states.requires_grad_()
            gradients.append(torch.autograd.grad((run(states) * mixing).sum(), given))
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


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
