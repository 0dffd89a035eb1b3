"""What attention under sdpa costs beside the arithmetic: masks and copies of keys."""

import pytest
import torch
from support.memory import NewTensors
from support.tiny_models import random_tokens, streams_of
from transformers import DynamicCache, StaticCache


P, B, T, N = 3, 2, 20, 3  # up to 16 tokens count as decoding where there is a mask
NUM_HEADS = 4


@pytest.fixture
def sdpa_calls(monkeypatch):
    """`(attn_mask, is_causal)` of every call of torch's sdpa."""
    calls, function = [], torch.nn.functional.scaled_dot_product_attention

    def record(*args, attn_mask=None, is_causal=False, **kwargs):
        calls.append((attn_mask, is_causal))
        return function(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    return calls


@pytest.mark.parametrize("mask", [None, torch.ones(B, T, dtype=torch.long)], ids=["none", "nothing padded"])
@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
@pytest.mark.parametrize(("model_type", "changes"), [("qwen2", {}), ("mistral", {"sliding_window": 64}), ("gpt2", {})])
def test_no_mask_is_built_where_the_backbone_needs_none(sdpa_calls, model_type, changes, cache, mask):
    model = streams_of(model_type, **changes)
    caches = {
        None: lambda: {"use_cache": False},
        "dynamic": lambda: {"past_key_values": DynamicCache(config=model.config)},
        "static": lambda: {"past_key_values": StaticCache(config=model.config, max_cache_len=24)},
    }
    inputs = {"input_ids": random_tokens(B, T), "attention_mask": mask}
    sdpa_calls.clear()
    with model.disable_adapter():
        model(**inputs, **caches[cache]())
    assert sdpa_calls == [(None, True)] * 2
    sdpa_calls.clear()
    model(**inputs, **caches[cache]())
    assert sdpa_calls == [(None, True)] * 2


@pytest.mark.parametrize("model_type", ["qwen2", "mistral", "gemma3_text"])
def test_masks_are_built_once_per_sample(sdpa_calls, model_type):
    model = streams_of(model_type)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, :3] = 0
    sdpa_calls.clear()
    with torch.no_grad(), NewTensors(mask, *model.parameters()) as new:
        model(input_ids=random_tokens(B, T), attention_mask=mask)
    assert [tuple(mask.shape) for mask, _ in sdpa_calls] == [(B, 1, T, N + T)] * 2
    masks = [tensor.shape for tensor in new.tensors if tensor.dtype == torch.bool and tensor.dim() == 4]
    assert {shape[0] for shape in masks} <= {1, B}


@torch.no_grad()
def largest_size(context_size, num_tokens):
    """Elements of the largest tensor that one decoding step allocates."""
    model = streams_of(num_hidden_layers=1, max_position_embeddings=512)
    cache = StaticCache(config=model.config, max_cache_len=context_size)
    model(input_ids=random_tokens(B, 5), past_key_values=cache)
    known = (cache.layers[0].keys, cache.layers[0].values, *model.parameters(), *model.buffers())
    with NewTensors(*known) as new:
        model(input_ids=random_tokens(B, num_tokens), past_key_values=cache)
    return max(tensor.numel() for tensor in new.tensors)


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_decoding_allocates_scores_but_no_keys_or_values_for_every_cached_token(num_tokens):
    """Keys and values of one cached token have 2 heads of size 8 per stream and sample; scores are one per head."""
    growth = largest_size(400, num_tokens) - largest_size(200, num_tokens)
    assert growth == 200 * B * P * NUM_HEADS * num_tokens
