"""The correlation between streams, against a plain loop and finite differences."""

import itertools

import numpy as np
import pytest
import torch

from parscale_adapt.core.decorrelation import stream_decorrelation


def random_states(num_streams=3, batch=2, seq_len=7, hidden_size=5, seed=0):
    """Streams that are correlated, at scales and offsets of their own, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_streams, batch, seq_len, hidden_size)
    shared = torch.randn(1, *shape[1:], generator=generator, dtype=torch.double)
    own = torch.randn(*shape, generator=generator, dtype=torch.double)
    scale = torch.arange(1.0, hidden_size + 1, dtype=torch.double)
    return (shared + own) * scale + 3 * scale


def by_loop(states, mask):
    """The mean of squared correlations, one pair of features at a time."""
    tokens = [stream[mask.astype(bool)] for stream in states.numpy()]
    squares = [
        np.corrcoef(one[:, i], other[:, j])[0, 1] ** 2
        for one, other in itertools.permutations(tokens, 2)
        for i in range(one.shape[1])
        for j in range(other.shape[1])
    ]
    return float(np.mean(squares))


# Tokens against (num_streams - 1) / 2 times features: matrices of features in the first two, of tokens in the others.
SIZES = [(2, 2, 7, 5), (3, 2, 7, 5), (2, 1, 4, 20), (4, 2, 5, 16)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("is_masked", [False, True])
def test_the_value_is_that_of_a_plain_loop(size, is_masked):
    states = random_states(*size)
    mask = torch.ones(size[1:3], dtype=torch.long)
    if is_masked:
        mask[0, 3:] = 0
        states[:, 0, 3:] = 1e3  # what stands in padding
    value = stream_decorrelation(states, mask if is_masked else None)
    assert value.item() == pytest.approx(by_loop(states, mask.numpy()), rel=1e-4)


@pytest.mark.parametrize("size", [(2, 2, 4, 3), (3, 1, 4, 9)], ids=["features", "tokens"])
def test_the_gradient_is_that_of_finite_differences(size):
    states = random_states(*size).requires_grad_()
    mask = torch.ones(size[1:3], dtype=torch.long)
    mask[0, 0] = 0
    assert torch.autograd.gradcheck(lambda x: stream_decorrelation(x, mask), states)
    (gradient,) = torch.autograd.grad(stream_decorrelation(states, mask), states)
    assert not gradient[:, 0, 0].any()
    assert gradient[:, 0, 1].any()


@pytest.mark.parametrize("size", [(3, 2, 40, 4), (3, 1, 3, 40)])
def test_scale_and_offset_of_a_feature_do_not_count(size):
    states = random_states(*size)
    changed = states * torch.rand(size[-1], dtype=torch.double).add(1) - 7
    torch.testing.assert_close(stream_decorrelation(changed), stream_decorrelation(states), rtol=1e-4, atol=0)


def test_the_ends_of_the_scale():
    feature = torch.randn(1, 1, 50, 1, generator=torch.Generator().manual_seed(0)).double()
    assert stream_decorrelation(feature.expand(3, 1, 50, 4)).item() == pytest.approx(1, abs=1e-4)
    apart = torch.zeros(2, 1, 4, 1, dtype=torch.double)
    apart[0, 0, :, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    apart[1, 0, :, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert stream_decorrelation(apart).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("num_counted", [0, 1])
def test_too_few_tokens_to_correlate_give_zero_and_finite_gradients(num_counted):
    states = random_states().float().requires_grad_()
    mask = torch.zeros(2, 7)
    mask[0, :num_counted] = 1
    value = stream_decorrelation(states, mask)
    value.backward()
    assert value == 0
    assert states.grad is not None
    assert not states.grad.any()


def test_features_that_never_vary_give_finite_gradients():
    states = random_states().float()
    states[..., 0] = 2.0
    states.requires_grad_()
    stream_decorrelation(states).backward()
    assert states.grad.isfinite().all()


def test_half_precision_and_autocast_are_computed_in_float32():
    states = random_states().bfloat16()
    expected = stream_decorrelation(states.float())
    with torch.autocast("cpu", torch.bfloat16):
        value = stream_decorrelation(states)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)


@pytest.mark.parametrize(
    ("shape", "mask", "sentence"),
    [
        ((1, 2, 3, 4), None, "at least two streams, got \\[1, 2, 3, 4\\]"),
        ((4, 3, 4), None, "must be \\[num_streams, batch, seq_len, hidden_size\\]"),
        ((2, 2, 3, 4), (2, 4), "`token_mask` must be \\[2, 3\\], got \\[2, 4\\]"),
    ],
)
def test_other_shapes_are_refused(shape, mask, sentence):
    with pytest.raises(ValueError, match=sentence):
        stream_decorrelation(torch.zeros(shape), None if mask is None else torch.ones(mask))
