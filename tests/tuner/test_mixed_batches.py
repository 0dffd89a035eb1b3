"""One batch whose samples run different adapters; expected is each sample alone under its adapter, without a cache."""

import pytest
import torch
from support.tiny_models import random_tokens, tiny_model, with_streams

from parscale_adapt import ParScaleConfig


OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
NAMES = ["four", "__base__", "two", "one", "four"]


def resident(model_type="qwen2", implementation="sdpa"):
    """One backbone with P = 2 and 4 of different prefix lengths, and an adapter of a single stream."""
    model = with_streams(tiny_model(model_type, implementation), 2, adapter_name="two")
    torch.manual_seed(5)
    for name, num_streams, num_prefix_tokens in (("four", 4, 5), ("one", 1, 3)):
        config = ParScaleConfig(
            task_type="CAUSAL_LM", num_streams=num_streams, num_prefix_tokens=num_prefix_tokens, init_std=0.5
        )
        model.add_adapter(name, config)
    return model.eval()


def padded(num_samples):
    input_ids = random_tokens(num_samples, 8)
    mask = torch.ones_like(input_ids)
    for sample in range(num_samples):
        mask[sample, : sample % 4] = 0
    return input_ids, mask


def alone(model, name, run):
    """What `run` gives with the adapter `name` active."""
    if name == "__base__":
        with model.disable_adapter():
            return run()
    model.set_adapter(name)
    return run()


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "implementation"),
    [("qwen2", "sdpa"), ("qwen2", "eager"), ("mistral", "sdpa"), ("gemma3_text", "sdpa"), ("gpt2", "sdpa")],
)
def test_every_sample_gives_the_logits_that_it_gives_alone(model_type, implementation):
    model = resident(model_type, implementation)
    input_ids, mask = padded(len(NAMES))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    result = model(input_ids=input_ids, attention_mask=mask, position_ids=positions, adapter_names=NAMES).logits
    for sample, name in enumerate(NAMES):
        tokens = input_ids[sample : sample + 1, sample % 4 :]
        expected = alone(model, name, lambda tokens=tokens: model(input_ids=tokens, use_cache=False).logits)
        torch.testing.assert_close(result[sample : sample + 1, sample % 4 :], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["greedy", "beams", "static"],
)
@pytest.mark.parametrize("model_type", ["qwen2", "mistral", "gpt2", "deepseek_v3"])
def test_every_sample_generates_what_it_generates_alone(model_type, options):
    model = resident(model_type)
    input_ids, mask = padded(len(NAMES))
    given = {**OPTIONS, **options}
    result = model.generate(input_ids=input_ids, attention_mask=mask, adapter_names=NAMES, **given)
    num_sequences = given.get("num_return_sequences", 1)
    uncached = {key: value for key, value in given.items() if not key.startswith(("cache", "disable"))}
    for sample, name in enumerate(NAMES):
        tokens = input_ids[sample : sample + 1, sample % 4 :]
        expected = alone(model, name, lambda t=tokens: model.generate(input_ids=t, use_cache=False, **uncached))
        found = result[sample * num_sequences : (sample + 1) * num_sequences, sample % 4 :]
        assert torch.equal(found, expected), name


def test_after_a_mixed_batch_the_active_adapter_runs_alone_again():
    model = resident()
    model.set_adapter("two")
    expected = model(input_ids=random_tokens()).logits
    model(input_ids=random_tokens(), adapter_names=["four", "__base__"])
    assert torch.equal(model(input_ids=random_tokens()).logits, expected)


def test_a_cache_of_a_mixed_batch_is_refused_by_other_adapters():
    model = resident()
    cache = model(input_ids=random_tokens(), adapter_names=["four", "__base__"]).past_key_values
    message = "filled by a batch of the adapter 'four', the plain backbone and can't be continued by the adapter 'two'"
    with pytest.raises(ValueError, match=message):
        model(input_ids=random_tokens(), past_key_values=cache)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["four", "six"], r"`adapter_names` must name loaded adapters, \['four', 'one', 'two'\], got \['six'\]"),
        (["four"] * 3, "`adapter_names` must name one adapter per sample, got 3 names for 2 samples"),
    ],
)
def test_wrong_names_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        resident()(input_ids=random_tokens(), adapter_names=names)


def test_mixing_adapters_in_training_is_refused():
    with pytest.raises(ValueError, match="`adapter_names` mixes adapters for inference only"):
        resident().train()(input_ids=random_tokens(), adapter_names=["two", "four"])
