"""What the engine's options become, without an engine."""

from types import SimpleNamespace

import pytest

from parscale_vllm.checks import divide_token_budget, set_block_size


def scheduler(**fields):
    return SimpleNamespace(
        **{"enable_chunked_prefill": True, "max_num_batched_tokens": 2048, "max_num_seqs": 16, **fields}
    )


@pytest.mark.parametrize(
    ("fields", "budget"),
    [
        ({}, 512),
        ({"max_num_seqs": 1024}, 1024),  # a step must hold one token of every request
        ({"enable_chunked_prefill": False}, 2048),  # or a whole prompt
    ],
)
def test_the_budget_of_a_step_counts_rows(fields, budget):
    settings = scheduler(**fields)
    divide_token_budget(settings, 4)
    assert settings.max_num_batched_tokens == budget


@pytest.mark.parametrize(
    ("prefix", "block"), [(16, 16), (48, 16), (32, 32), (96, 32), (64, 64), (192, 64), (256, 128)]
)
def test_the_prefix_fills_whole_blocks_that_are_as_large_as_they_can_be(prefix, block):
    cache = SimpleNamespace(block_size=128, user_specified_block_size=False)
    set_block_size(cache, prefix)
    assert (cache.block_size, cache.user_specified_block_size) == (block, True)


def test_a_fitting_block_size_of_the_user_stays():
    cache = SimpleNamespace(block_size=16, user_specified_block_size=True)
    set_block_size(cache, 64)
    assert cache.block_size == 16


@pytest.mark.parametrize("prefix", [0, 8, 20])
def test_other_lengths_of_a_prefix_are_refused_with_those_that_fit(prefix):
    with pytest.raises(ValueError, match=f"such as 16, 32, 48 or 64, .* got {prefix}"):
        set_block_size(SimpleNamespace(block_size=128, user_specified_block_size=False), prefix)
