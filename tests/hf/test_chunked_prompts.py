"""A prompt that a few streams at a time read into a cache: what comes after it is as if all had read it at once."""

import pytest
import torch
from support.memory import LiveTensors
from support.outputs import GREEDY
from support.tiny_models import random_tokens, streams_of, tiny_model, with_streams
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Fp8QuantizedLayer


def padded():
    ids, mask = random_tokens(), torch.ones(2, 9, dtype=torch.long)
    ids[0, :4] = mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def seen_rows(model):
    """Numbers of rows that the first attention module runs on, one for each time."""
    rows = []
    name = next(name for name, _ in model.named_modules() if name.endswith(("self_attn", ".attn")))

    def see(module, args, kwargs):
        rows.append((*args, *kwargs.values())[0].shape[0])

    model.get_submodule(name).register_forward_pre_hook(see, with_kwargs=True)
    return rows


CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("model_type", ["qwen2", "mistral", "gemma3_text", "deepseek_v3", "gpt_oss", "gpt2"])
def test_a_prompt_read_in_chunks_is_continued_like_one_read_at_once(model_type, cache):
    model = streams_of(model_type, 3)
    prompt = padded()
    expected = generate(model, **prompt, **CACHES[cache])
    rows = seen_rows(model)
    for size, chunks in ((1, [2, 2, 2]), (2, [4, 2])):
        model.set_stream_chunk_size(size)
        rows.clear()
        for found, wanted in zip(generate(model, **prompt, **CACHES[cache]), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        num_beams = CACHES[cache].get("num_beams", 1)
        assert rows == [num_beams * count for count in chunks] + 5 * [num_beams * 6]


def generate(model, **options):
    """Tokens, and the logits of each step."""
    output = model.generate(**GREEDY | options, output_logits=True, return_dict_in_generate=True)
    return (output.sequences, *output.logits)


def test_a_quantized_cache_is_filled_in_chunks(monkeypatch):
    """In float32 instead of 8 bits, everything around the numbers is seen exactly."""
    monkeypatch.setattr(Fp8QuantizedLayer, "fp8_dtype", torch.float32)
    model = streams_of("qwen2", 3)
    cache = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    expected = generate(model, **padded(), **cache)
    model.set_stream_chunk_size(1)
    for found, wanted in zip(generate(model, **padded(), **cache), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["qwen2", "mistral", "deepseek_v3"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_the_cache_that_chunks_fill_is_that_of_all_streams_at_once(kind, model_type):
    model, filled = streams_of(model_type, 3), []
    for size in (None, 2):
        model.set_stream_chunk_size(size)
        cache = kind(config=model.config, **({"max_cache_len": 12} if kind is StaticCache else {}))
        output = model(input_ids=random_tokens(), past_key_values=cache)
        assert output.past_key_values is cache
        assert type(cache) is kind
        filled.append([(layer.keys, layer.values, layer.get_seq_length()) for layer in cache.layers])
    torch.testing.assert_close(filled[1], filled[0], atol=1e-5, rtol=1e-5)
    made = model(input_ids=random_tokens()).past_key_values
    assert made.layers[0].keys.shape[1] == filled[0][0][0].shape[1]


@torch.no_grad()
def test_the_activations_of_a_prompt_do_not_grow_with_the_number_of_streams():
    """Beside the cache and the final hidden states of each stream."""
    peaks = {}
    for num_streams in (2, 8):
        for size in (None, 1):
            model = with_streams(tiny_model(), num_streams, aggregator="static", stream_chunk_size=size)
            with LiveTensors() as tensors:
                output = model(input_ids=random_tokens(2, 96), use_cache=True, logits_to_keep=1)
            kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
            peaks[num_streams, size] = tensors.peak - kept
    states = 2 * 96 * 32 * 4
    assert peaks[8, None] > 2.5 * peaks[2, None]
    assert peaks[8, 1] <= peaks[2, 1] + 2 * (8 - 2) * states


@torch.no_grad()
def test_a_filled_cache_and_single_tokens_run_all_streams_at_once():
    model = streams_of("qwen2", 3)
    model.set_stream_chunk_size(1)
    rows = seen_rows(model)
    cache = model(input_ids=random_tokens()[:, :6]).past_key_values
    logits = model(input_ids=random_tokens()[:, 6:], past_key_values=cache).logits
    model(input_ids=random_tokens()[:, :1])
    assert rows == [2, 2, 2, 6, 6]
    torch.testing.assert_close(logits, model(input_ids=random_tokens(), use_cache=False).logits[:, 6:])


def test_a_prompt_is_read_in_chunks_in_training_mode_too():
    model = streams_of("qwen2", 3).train()
    expected = generate(model, **padded())
    rows = seen_rows(model)
    model.set_stream_chunk_size(1)
    for found, wanted in zip(generate(model, **padded()), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert rows == [2, 2, 2] + 5 * [6]


def test_recurrent_states_are_refused_where_a_prompt_is_read_in_chunks():
    model = with_streams(tiny_model("lfm2", layer_types=["conv", "full_attention"]), 2, stream_chunk_size=1)
    prompt = {"input_ids": random_tokens(), "max_new_tokens": 2, "do_sample": False}
    with pytest.raises(
        ValueError, match=r"into a cache with recurrent states, which .* set `stream_chunk_size` to None"
    ):
        model.generate(**prompt)
    model.set_stream_chunk_size(None)
    assert model.generate(**prompt).shape == (2, 11)
