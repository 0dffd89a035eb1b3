"""Architectures with recurrent states beside, or instead of, keys and values; expected is the run without a cache."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from support.outputs import GREEDY
from support.tiny_models import random_tokens
from transformers import DynamicCache, GenerationConfig

from parscale_adapt import ParScaleConfig


pytestmark = pytest.mark.slow


SCRIPTS = Path(__file__).parents[2] / "scripts"
# Convolutions alone, linear attention, state space layers of both kinds; alternating with attention or in one layer.
HYBRIDS = (
    "lfm2",
    "qwen3_next",
    "kimi_linear",
    "falcon_h1",
    "jamba",
    "bamba",
    "granitemoehybrid",
    "zamba2",
    "nemotron_h",
)
WITHOUT_ATTENTION = ("mamba", "mamba2", "falcon_mamba")
STATIC = {"cache_implementation": "static", "disable_compile": True}
STRATEGIES = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
    "static": STATIC,
    "static beams": {**STATIC, "num_beams": 3},
}


@pytest.fixture(scope="module", autouse=True)
def _scripts_can_be_imported():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield


def backbone(model_type):
    import tiny_architectures

    return tiny_architectures.tiny_model(model_type)


def streams_config(model_type, num_streams=3, **fields):
    kinds = {"stream_transform": "lora"} if model_type in WITHOUT_ATTENTION else {"num_prefix_tokens": 3}
    return ParScaleConfig(task_type="CAUSAL_LM", num_streams=num_streams, init_std=0.5, **kinds | fields)


def let_streams_differ(model):
    """Low-rank weights start at nothing."""
    for name, parameter in model.named_parameters():
        if name.endswith(".lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def hybrid_streams(model_type, **fields):
    torch.manual_seed(1)
    return let_streams_differ(get_peft_model(backbone(model_type), streams_config(model_type, **fields)))


def with_second_adapter(model, model_type):
    fields = {} if model_type in WITHOUT_ATTENTION else {"num_prefix_tokens": 5}
    model.add_adapter("four", streams_config(model_type, num_streams=4, **fields))
    return let_streams_differ(model)


def padded():
    input_ids, mask = random_tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


def generate(model, inputs=None, **options):
    torch.manual_seed(0)
    return model.generate(**inputs or padded(), **GREEDY | options)


def uncached(options):
    return {"use_cache": False, **{name: options[name] for name in options.keys() - STATIC.keys()}}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("model_type", HYBRIDS + WITHOUT_ATTENTION)
def test_cached_generation_gives_the_tokens_of_uncached_generation(model_type, strategy):
    model, options = hybrid_streams(model_type), STRATEGIES[strategy]
    result = generate(model, **options)
    assert torch.equal(result, generate(model, **uncached(options)))
    with model.disable_adapter():
        assert not torch.equal(result, generate(model, **options))


@pytest.mark.parametrize("model_type", HYBRIDS + WITHOUT_ATTENTION)
def test_padding_changes_no_token(model_type):
    model, inputs = hybrid_streams(model_type), padded()
    alone = generate(model, {"input_ids": inputs["input_ids"][:1, 3:]}, use_cache=False)
    assert torch.equal(generate(model)[:1, 3:], alone)


@torch.no_grad()
@pytest.mark.parametrize("model_type", HYBRIDS + WITHOUT_ATTENTION)
def test_a_returned_cache_has_the_batch_of_the_caller_and_goes_on(model_type):
    model, input_ids = hybrid_streams(model_type), random_tokens(2, 8)  # one chunk of the plain backbones' scans
    name = "cache_params" if model_type in WITHOUT_ATTENTION else "past_key_values"
    positions = {"position_ids": torch.full((2, 1), 6)} if model_type in HYBRIDS else {}  # bamba doesn't count
    expected = model(input_ids=input_ids, use_cache=False).logits
    output = model(input_ids=input_ids[:, :6], use_cache=True)
    logits, cache = [output.logits], output[name]
    for token in (6, 7):
        states = [layer.conv_states[0] for layer in cache.layers if hasattr(layer, "conv_states")]
        states = [state for state in states if state is not None]  # transformers 5.20 has layers without any
        assert states
        assert all(len(state) == 2 for state in states)
        output = model(input_ids=input_ids[:, token : token + 1], use_cache=True, **{name: cache}, **positions)
        assert output[name] is cache
        logits.append(output.logits)
        positions = {key: value + 1 for key, value in positions.items()}
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("model_type", HYBRIDS + WITHOUT_ATTENTION)
def test_samples_of_a_batch_may_run_different_adapters(model_type, num_beams):
    model = with_second_adapter(hybrid_streams(model_type), model_type)
    names, input_ids = ["four", "__base__", "default", "four"], random_tokens(4, 8)
    result = generate(model, {"input_ids": input_ids}, adapter_names=names, num_beams=num_beams)
    for sample, name in enumerate(names):
        inputs = {"input_ids": input_ids[sample : sample + 1]}
        if name == "__base__":
            with model.disable_adapter():
                expected = generate(model, inputs, num_beams=num_beams, use_cache=False)
        else:
            model.set_adapter(name)
            expected = generate(model, inputs, num_beams=num_beams, use_cache=False)
        assert torch.equal(result[sample : sample + 1], expected), name


@pytest.mark.parametrize("model_type", ["qwen3_next", "falcon_h1", "mamba"])
def test_a_cache_follows_no_switch_of_the_adapter_until_it_is_emptied(model_type):
    model = with_second_adapter(hybrid_streams(model_type), model_type)
    name = "cache_params" if model_type in WITHOUT_ATTENTION else "past_key_values"
    cache = DynamicCache(config=model.config)
    model(input_ids=random_tokens(2, 8), use_cache=True, **{name: cache})
    made_inside = model(input_ids=random_tokens(2, 8), use_cache=True)[name]
    model.set_adapter("four")
    for filled in (cache, made_inside):
        with pytest.raises(
            ValueError, match="filled by the adapter 'default' and can't be continued by the adapter 'four'"
        ):
            model(input_ids=random_tokens(2, 1), use_cache=True, **{name: filled})
    for adapter in ("four", "default", "four"):
        model.set_adapter(adapter)
        assert torch.equal(generate(model, **STATIC), generate(model, use_cache=False))  # `generate` keeps its cache


@pytest.mark.parametrize("build", [backbone, hybrid_streams])
def test_continuous_batching_is_as_far_as_transformers_takes_it(build):
    """It has pages for keys and values only."""
    model = build("qwen3_next")
    with pytest.raises(ValueError, match="Invalid layer type: linear_attention"):
        model.generate_batch([[5, 6, 7]], generation_config=GenerationConfig(eos_token_id=-1), warmup=False)


def test_prompt_lookup_takes_back_guesses_from_convolutions():
    model = hybrid_streams("lfm2")
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])}
    expected = generate(model, inputs, max_new_tokens=12, use_cache=False)
    assert torch.equal(generate(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2", "jamba", "mamba"])
def test_gradients_need_no_cache_and_are_those_with_one(model_type):
    gradients = []
    for use_cache in (None, False):
        model = hybrid_streams(model_type).train()
        model(input_ids=random_tokens(), labels=random_tokens(), use_cache=use_cache).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    torch.testing.assert_close(*gradients)
