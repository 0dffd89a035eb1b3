import itertools

import pytest
import torch
from support.memory import NewTensors
from torch.nn import functional as F

from parscale_adapt.core.joined_attention import attend_over_prefix_and_cache, can_join


B, HEADS, KEY_VALUE_HEADS, N, KEY_SIZE, VALUE_SIZE = 2, 6, 2, 3, 8, 4


def states(num_queries, num_keys, dtype=torch.float32):
    """Queries, keys, values, and keys and values of a prefix."""
    shapes = [
        (HEADS, num_queries, KEY_SIZE),
        (KEY_VALUE_HEADS, num_keys, KEY_SIZE),
        (KEY_VALUE_HEADS, num_keys, VALUE_SIZE),
        (KEY_VALUE_HEADS, N, KEY_SIZE),
        (KEY_VALUE_HEADS, N, VALUE_SIZE),
    ]
    return [torch.randn(B, *shape).to(dtype) for shape in shapes]


def masks(num_queries, num_keys):
    """Every kind of mask, with the same one as a number per score."""
    visible = torch.rand(B, 1, num_queries, num_keys) < 0.6
    visible[..., 0] = True
    added = torch.zeros(B, 1, num_queries, num_keys).masked_fill(~visible, torch.finfo(torch.float32).min)
    per_head = torch.randn(1, HEADS, num_queries, num_keys)
    return {
        "none": (None, torch.zeros(())),
        "bool": (visible, added),
        "added": (added, added),
        "bias": (per_head,) * 2,
    }


def by_concatenation(query, key, value, prefix, bias, scaling):
    groups, (prefix_key, prefix_value) = HEADS // KEY_VALUE_HEADS, prefix
    keys, values = torch.cat([prefix_key, key], 2), torch.cat([prefix_value, value], 2)
    scores = query @ keys.repeat_interleave(groups, 1).mT * scaling
    scores = scores + F.pad(bias.expand(*scores.shape[:-1], key.shape[2]), (N, 0))
    return (torch.softmax(scores, -1) @ values.repeat_interleave(groups, 1)).transpose(1, 2)


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("mask", ["none", "bool", "added", "bias"])
@pytest.mark.parametrize("num_queries", [1, 5])
def test_it_gives_outputs_and_gradients_of_attention_over_concatenated_keys(num_queries, mask, scaling):
    given = [tensor.requires_grad_() for tensor in states(num_queries, 7)]
    attention_mask, bias = masks(num_queries, 7)[mask]
    found, weights = attend_over_prefix_and_cache(*given[:3], given[3:], attention_mask, scaling)
    expected = by_concatenation(*given[:3], given[3:], bias, scaling or KEY_SIZE**-0.5)
    assert weights.shape == (B, HEADS, num_queries, N + 7)
    values = torch.cat([given[4], given[2]], 2).repeat_interleave(HEADS // KEY_VALUE_HEADS, 1)
    torch.testing.assert_close((weights @ values).transpose(1, 2), expected)
    assert found.shape == (B, num_queries, HEADS, VALUE_SIZE)
    torch.testing.assert_close(found, expected)
    mixing = torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad((out * mixing).sum(), given) for out in (found, expected))):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_half_precision_scores_are_masked_and_normalized_in_float32(mask):
    given = states(2, 300, torch.bfloat16)
    attention_mask, bias = masks(2, 300)[mask]
    found, _ = attend_over_prefix_and_cache(*given[:3], given[3:], attention_mask, None)
    assert found.dtype == torch.bfloat16
    query, key, value, *prefix = (tensor.double() for tensor in given)
    expected = by_concatenation(query, key, value, prefix, bias.double(), KEY_SIZE**-0.5)
    torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_scores_are_held_twice_in_float32_and_twice_in_the_dtype_of_the_states(mask):
    """Their products and their softmax, before and after they change type; a key or value is never copied."""
    num_queries, num_keys = 4, 500
    given = states(num_queries, num_keys, torch.bfloat16)
    attention_mask = masks(num_queries, num_keys)[mask][0]
    with torch.no_grad(), NewTensors(*given) as new:
        attend_over_prefix_and_cache(*given[:3], given[3:], attention_mask, None)
    num_scores = B * HEADS * num_queries * (N + num_keys)
    assert max(new.sizes) <= 4 * num_scores
    assert sum(new.sizes) <= 1.1 * (2 * 4 + 2 * 2) * num_scores


def test_scores_are_joined_up_to_a_bound_on_their_number():
    assert all(can_join(1, num_keys) for num_keys in (1, 10**4, 10**6))
    assert [can_join(num_queries, 100) for num_queries in (2, 16, 17)] == [True, True, False]
    bounds = {2: 65536, 5: 26214, 16: 8192}
    for (num_queries, bound), beyond in itertools.product(bounds.items(), (0, 1)):
        assert can_join(num_queries, bound + beyond) == (not beyond)


def test_products_in_float16_do_not_overflow_before_they_are_scaled():
    query, key, value, *prefix = states(1, 7, torch.float16)
    query, key = torch.full_like(query, 150), torch.full_like(key, 70)  # products of 84,000, far above the prefix's
    found, _ = attend_over_prefix_and_cache(query, key, value, tuple(prefix), None, None)
    expected = value.mean(2).repeat_interleave(HEADS // KEY_VALUE_HEADS, 1)[:, None]
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
