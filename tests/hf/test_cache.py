import copy

import pytest
import torch
from support.outputs import GREEDY, generate
from support.tiny_models import random_tokens, streams_of
from transformers import DynamicCache, StaticCache

from parscale_adapt import ParScaleConfig
from parscale_adapt.core.layout import UniformLayout
from parscale_adapt.hf.cache import stream_view, viewed_cache


STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("model_type", "num_streams"), [("qwen2", 2), ("qwen2", 4), ("mistral", 2), ("gpt2", 2)])
def test_cached_generation_gives_the_tokens_of_uncached_generation(model_type, num_streams, strategy):
    model = streams_of(model_type, num_streams)
    cached = generate(model, **STRATEGIES[strategy])
    assert torch.equal(cached, generate(model, use_cache=False, **STRATEGIES[strategy]))
    assert cached[:, 8:].unique().numel() > 2
    with model.disable_adapter():
        assert not torch.equal(cached, generate(model, **STRATEGIES[strategy]))


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt_oss", "opt", "qwen3_moe", "deepseek_v3"])
def test_cached_beams_of_further_architectures_give_the_tokens_of_uncached_beams(model_type):
    model = streams_of(model_type)
    assert torch.equal(generate(model, num_beams=3), generate(model, num_beams=3, use_cache=False))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 3}])
@pytest.mark.parametrize("model_type", ["qwen2", "mistral"])
def test_a_static_cache_gives_the_tokens_of_uncached_generation(model_type, options):
    model = streams_of(model_type)
    static = generate(model, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, generate(model, use_cache=False, num_beams=options.get("num_beams", 1)))


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2"])
def test_prompt_lookup_gives_the_tokens_of_greedy_search(model_type):
    model = streams_of(model_type)
    expected = generate(model, 1, use_cache=False, max_new_tokens=12)
    assert torch.equal(generate(model, 1, prompt_lookup_num_tokens=3, max_new_tokens=12), expected)


@pytest.mark.parametrize("model_type", ["qwen2", "mistral", "gemma3_text"])
def test_generation_continues_from_a_returned_cache(model_type):
    model = streams_of(model_type)
    expected = generate(model, 1, use_cache=False)
    first = generate(model, 1, max_new_tokens=3, return_dict_in_generate=True)
    continued = model.generate(
        input_ids=first.sequences, past_key_values=first.past_key_values, **{**GREEDY, "max_new_tokens": 3}
    )
    assert torch.equal(continued, expected)


@pytest.mark.parametrize("model_type", ["qwen2", "mistral", "gemma3_text", "gpt2", "gpt_oss"])
def test_logits_computed_in_pieces_with_a_cache_equal_those_computed_at_once(model_type):
    model = streams_of(model_type, 3)
    input_ids = random_tokens(2, 12)
    expected = model(input_ids=input_ids, use_cache=False).logits
    cache, pieces = None, []
    for piece in input_ids.split([4, 1, 5, 2], dim=1):
        output = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-4, rtol=1e-4)


def static_cache(model):
    return StaticCache(config=model.config, max_cache_len=16)


@pytest.mark.parametrize("make_cache", [lambda model: DynamicCache(), static_cache], ids=["dynamic", "static"])
def test_the_cache_of_the_caller_is_filled_and_returned(make_cache):
    model = streams_of("qwen2", 3)
    cache = make_cache(model)
    output = model(input_ids=random_tokens(), past_key_values=cache)
    assert output.past_key_values is cache
    assert type(cache) in (DynamicCache, StaticCache)
    assert cache.get_seq_length() == 9
    assert cache.layers[0].keys.shape[:2] == (2, 3 * 2)


def test_the_cache_holds_streams_as_heads_and_no_prefix():
    """Keys of layer 0 don't depend on the prefix, so every stream caches the plain backbone's."""
    model = streams_of("qwen2", 3)
    cache = model(input_ids=random_tokens()).past_key_values
    with model.disable_adapter():
        plain = model(input_ids=random_tokens()).past_key_values
    for kind in ("keys", "values"):
        expected = getattr(plain.layers[0], kind).repeat(1, 3, 1, 1)
        torch.testing.assert_close(getattr(cache.layers[0], kind), expected)
    assert not torch.allclose(cache.layers[1].keys[:, :2], cache.layers[1].keys[:, 2:4])


def test_a_view_shares_all_state_with_its_cache():
    cache = DynamicCache()
    view = stream_view(cache, UniformLayout(2), {0})
    assert viewed_cache(view) is cache
    assert viewed_cache(cache) is cache
    assert viewed_cache(None) is None
    keys, values = view.update(torch.randn(6, 2, 4, 8), torch.randn(6, 2, 4, 8), 0)
    assert keys.shape == values.shape == (3, 4, 4, 8)
    assert cache.get_seq_length() == view.get_seq_length() == 4
    assert cache.layers[0].keys.shape == (3, 4, 4, 8)
    cache.crop(-1)
    assert view.get_seq_length() == 3
    view.note = "kept"
    assert cache.note == "kept"


def test_a_view_gives_rows_back_to_layers_that_attend_to_something_else_than_they_cache():
    view = stream_view(DynamicCache(), UniformLayout(2), set())
    rows = [torch.randn(6, 1, 4, 3) for _ in range(4)]
    for keys, values in (rows[:2], rows[2:]):
        stored = view.update(keys, values, 0)
    assert torch.equal(stored[0], torch.cat([rows[0], rows[2]], 2))
    assert torch.equal(stored[1], torch.cat([rows[1], rows[3]], 2))


def two_adapters():
    model = streams_of("qwen2", 2)
    for name, num_streams in (("same", 2), ("wider", 4), ("one", 1)):
        model.add_adapter(name, ParScaleConfig(task_type="CAUSAL_LM", num_streams=num_streams, num_prefix_tokens=3))
    return model


@pytest.mark.parametrize("first", ["default", "one"])
@pytest.mark.parametrize("second", ["default", "same", "wider", "one"])
def test_a_cache_filled_under_another_adapter_is_refused(first, second):
    model = two_adapters()
    model.set_adapter(first)
    cache = model(input_ids=random_tokens()).past_key_values
    model.set_adapter(second)
    if first == second:
        assert model(input_ids=random_tokens(), past_key_values=cache).logits.isfinite().all()
        return
    names = [f"the adapter '{name}'" for name in (first, second)]
    message = f"`past_key_values` was filled by {names[0]} and can't be continued by {names[1]}: start again"
    with pytest.raises(ValueError, match=message):
        model(input_ids=random_tokens(), past_key_values=cache)


def test_a_cache_filled_by_streams_is_refused_by_the_plain_backbone_and_kept():
    model = two_adapters()
    cache = model(input_ids=random_tokens()).past_key_values
    with model.disable_adapter(), pytest.raises(ValueError, match="can't be continued by the plain backbone"):
        model(input_ids=random_tokens(), past_key_values=cache)
    assert cache.get_seq_length() == 9
    assert model(input_ids=random_tokens(), past_key_values=cache).past_key_values.get_seq_length() == 18


@torch.no_grad()
def test_a_copied_cache_continues_like_the_original():
    model = streams_of("qwen2")
    cache = model(input_ids=random_tokens()).past_key_values
    twin = copy.deepcopy(cache)
    expected = model(input_ids=random_tokens(), past_key_values=cache).logits
    assert torch.equal(model(input_ids=random_tokens(), past_key_values=twin).logits, expected)


def test_an_emptied_static_cache_serves_another_adapter():
    model = two_adapters()
    cache = static_cache(model)
    model(input_ids=random_tokens(), past_key_values=cache)
    cache.reset()
    model.set_adapter("wider")
    expected = model(input_ids=random_tokens()).logits
    result = model(input_ids=random_tokens(), past_key_values=cache).logits
    torch.testing.assert_close(result, expected)
