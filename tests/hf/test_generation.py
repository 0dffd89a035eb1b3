"""Ways of generating that tests/test_cache.py doesn't cover; expected is plain greedy search without a cache."""

import contextlib

import pytest
import torch
from support.outputs import GREEDY, generate
from support.tiny_models import random_tokens, streams_of, tiny_model, with_second_adapter
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import Fp8QuantizedLayer
from transformers.generation.streamers import BaseStreamer


pytestmark = pytest.mark.slow


FP8 = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}


class Recorder(BaseStreamer):
    """Collects what a streamer is given."""

    def __init__(self):
        self.pieces, self.has_ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten())

    def end(self):
        self.has_ended = True


def test_a_streamer_gets_the_prompt_and_then_every_token_once():
    model, recorder = streams_of(), Recorder()
    expected = generate(model, 1, use_cache=False)
    generate(model, 1, streamer=recorder)
    assert [len(piece) for piece in recorder.pieces] == [8] + [1] * 6
    assert torch.equal(torch.cat(recorder.pieces), expected[0])
    assert recorder.has_ended


def nearly(model_type, num_streams):
    """Streams whose tokens a backbone of the same weights often guesses."""
    return streams_of(model_type, num_streams, init_std=0.05)


@pytest.mark.parametrize("assistant", ["the backbone", "another backbone", "streams"])
@pytest.mark.parametrize("model_type", ["qwen2", "mistral", "gemma3_text"])
def test_an_assistant_changes_no_token(model_type, assistant):
    calls = []
    assistants = {
        "the backbone": lambda: tiny_model(model_type),
        "another backbone": lambda: tiny_model("llama", seed=5),
        "streams": lambda: nearly(model_type, 2),
    }
    model = nearly(model_type, 3)
    expected = generate(model, 1, use_cache=False, max_new_tokens=12)
    model.get_base_model().register_forward_hook(lambda *call: calls.append(call))
    result = generate(model, 1, assistant_model=assistants[assistant](), max_new_tokens=12)
    assert torch.equal(result, expected)
    assert len(calls) == 12 if assistant == "another backbone" else len(calls) < 12


def test_streams_assist_a_plain_backbone():
    model = tiny_model()
    expected = generate(model, 1, use_cache=False, max_new_tokens=12)
    for num_streams in (1, 3):
        assistant = nearly("qwen2", num_streams)
        assert torch.equal(generate(model, 1, assistant_model=assistant, max_new_tokens=12), expected)


def test_a_cache_of_the_caller_is_filled_by_generation_and_continued():
    model = streams_of()
    expected = generate(model, 1, use_cache=False)
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=20)):
        first = generate(model, 1, max_new_tokens=3, past_key_values=cache, return_dict_in_generate=True)
        assert first.past_key_values is cache
        assert cache.get_seq_length() == 8 + 2
        options = {**GREEDY, "max_new_tokens": 3}
        assert torch.equal(model.generate(input_ids=first.sequences, past_key_values=cache, **options), expected)


def test_a_static_cache_that_generate_keeps_serves_every_adapter():
    """`generate` holds on to its static cache and empties it between two calls."""
    model = with_second_adapter(streams_of())
    options = {"cache_implementation": "static", "disable_compile": True}
    for name in ("default", "second", None, "default"):
        if name is not None:
            model.set_adapter(name)
        with model.disable_adapter() if name is None else contextlib.nullcontext():
            assert torch.equal(generate(model, **options), generate(model, use_cache=False))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_decoding_with_a_static_cache_compiles_into_one_graph(backend):
    model = streams_of(num_hidden_layers=1)
    expected = generate(model, use_cache=False)
    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compile_config._compile_all_devices = True  # elsewhere `generate` compiles on accelerators only
    torch._dynamo.reset()
    counters.clear()
    result = generate(model, cache_implementation="static", compile_config=compile_config)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(result, expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_quantized_cache_without_loss_gives_the_tokens_of_no_cache(monkeypatch, options):
    """In float32 instead of 8 bits, everything around the numbers is seen exactly."""
    monkeypatch.setattr(Fp8QuantizedLayer, "fp8_dtype", torch.float32)
    model = streams_of()
    assert torch.equal(generate(model, **FP8, **options), generate(model, use_cache=False, **options))


@torch.no_grad()
def test_a_cache_in_8_bits_costs_little_precision():
    model, input_ids = streams_of(), random_tokens(2, 12)
    expected = model(input_ids=input_ids, use_cache=False).logits
    cache = QuantizedCache("fp8", model.config)
    pieces = [model(input_ids=piece, past_key_values=cache).logits for piece in input_ids.split([6, 1, 5], dim=1)]
    quantized = cache.layers[0]._quantized_keys[0]
    assert (quantized.dtype, quantized.shape) == (torch.float8_e4m3fn, (2, 3 * 2, 12, 8))
    error = (torch.cat(pieces, 1) - expected).abs()
    assert error[:, :6].max() < 1e-4  # the first piece attends to what it brings itself
    assert 0.001 < error[:, 6:].mean() / expected.abs().mean() < 0.1


class Streamless:
    """Stands for a CUDA stream where there is none: copies between host and device happen at once."""

    def wait_stream(self, stream):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text"])
def test_an_offloaded_cache_gives_the_tokens_of_no_cache(monkeypatch, model_type, implementation, options):
    """Without a GPU keys are offloaded from host to host: the calls are real, the copies aren't."""
    monkeypatch.setattr(torch, "Stream", Streamless)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Streamless())
    model = streams_of(model_type)
    expected = generate(model, use_cache=False, **options)
    result = generate(model, cache_implementation=implementation, disable_compile=True, **options)
    assert torch.equal(result, expected)


def test_a_compiled_model_is_one_graph_and_follows_switches_of_the_adapter():
    model = with_second_adapter(streams_of(num_hidden_layers=1))
    inputs = {"input_ids": random_tokens(), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    inputs["attention_mask"][0, :3] = 0
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    with model.disable_adapter():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


def test_a_compiled_model_has_the_gradients_of_the_model():
    gradients = []
    for compiles in (False, True):
        model = streams_of(num_hidden_layers=1).train()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
        run(input_ids=random_tokens(), labels=random_tokens()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])
