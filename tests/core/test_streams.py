import itertools

import numpy as np
import pytest
import torch

from parscale_adapt.core.streams import (
    aggregation_features,
    replicate,
    smooth_weights,
    weighted_sum,
)


P, B, T, H = 3, 2, 4, 5


@pytest.mark.parametrize("shape", [(B,), (B, T), (B, T, H), (B, 1, T, T)])
def test_row_p_times_b_plus_b_is_stream_p_of_sample_b(shape):
    samples = torch.randn(shape)
    rows = replicate(samples, P)
    assert rows.shape == (P * B, *shape[1:])
    for stream, sample in itertools.product(range(P), range(B)):
        assert torch.equal(rows[stream * B + sample], samples[sample])


def test_element_h_times_p_plus_p_of_the_features_is_hidden_element_h_of_stream_p():
    by_stream = torch.randn(P, B, T, H)
    features = aggregation_features(by_stream)
    assert features.shape == (B, T, H * P)
    for stream, element in itertools.product(range(P), range(H)):
        assert torch.equal(features[..., element * P + stream], by_stream[stream, ..., element])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.75])
def test_weights_are_a_softmax_pulled_towards_uniform(smoothing):
    logits = torch.randn(B, T, P) * 10
    weights = smooth_weights(logits, smoothing)
    powers = np.exp(logits.double().numpy())
    expected = powers / powers.sum(-1, keepdims=True) * (1 - smoothing) + smoothing / P
    np.testing.assert_allclose(weights.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(weights.sum(-1).numpy(), 1, atol=1e-6)
    assert weights.min() >= smoothing / P - 1e-7


def test_weights_are_computed_in_float32_from_half_precision_logits():
    logits = torch.randn(B, T, P).bfloat16()
    weights = smooth_weights(logits, 0.1)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, smooth_weights(logits.float(), 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weighted_sum_mixes_the_streams_of_each_token(dtype):
    hidden_states, weights = torch.randn(P * B, T, H).to(dtype), torch.rand(B, T, P)
    mixed = weighted_sum(hidden_states, weights)
    assert mixed.dtype == dtype
    states, shares = hidden_states.double().numpy(), weights.double().numpy()
    for sample, token in itertools.product(range(B), range(T)):
        expected = sum(shares[sample, token, stream] * states[stream * B + sample, token] for stream in range(P))
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        np.testing.assert_allclose(mixed[sample, token].double().numpy(), expected, atol=tolerance)


def test_the_weighted_sum_has_the_gradients_of_its_formula():
    hidden_states = torch.randn(P * B, T, H, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(B, T, P, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weighted_sum, (hidden_states, weights))
