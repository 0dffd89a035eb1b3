"""`generate_batch` with streams; expected is every prompt alone, by plain greedy search without a cache."""

import copy
from pathlib import Path

import pytest
import torch
from support import flash_reference
from support.tiny_models import streams_of, tiny_model, with_second_adapter, with_streams
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from parscale_adapt import ParScaleConfig


pytestmark = pytest.mark.slow


PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13], list(range(20, 40)), [33], [40, 41]]
GREEDY = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
# Few pages, and fewer tokens per step than the longest prompt has: it is read in pieces, beside tokens of other requests.
SMALL = {"num_blocks": 16, "page_size": 8, "max_batch_tokens": 16}


def expected_tokens(model, prompts=PROMPTS):
    options = {**GREEDY, "eos_token_id": None, "use_cache": False}
    return [model.generate(input_ids=torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]


def generated_tokens(model, prompts=PROMPTS, options=None, **arguments):
    results = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(**GREEDY | (options or {})),
        continuous_batching_config=ContinuousBatchingConfig(**SMALL | arguments.pop("config", {})),
        warmup=False,
        **arguments,
    )
    assert [result.error for result in results.values()] == [None] * len(results)
    return [result.generated_tokens for result in results.values()]


@pytest.mark.parametrize(
    ("model_type", "implementation"),
    [
        ("qwen2", "sdpa"),
        ("qwen2", "eager"),
        ("mistral", "sdpa"),
        ("gemma3_text", "sdpa"),
        ("gemma3_text", "eager"),
        ("phi3", "sdpa"),
        ("gpt_oss", "eager"),
    ],
)
def test_every_request_gives_the_tokens_that_it_gives_alone(model_type, implementation):
    model = streams_of(model_type, implementation=implementation)
    before = model.config.to_dict()
    expected = expected_tokens(model)
    assert generated_tokens(model) == expected
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == implementation
    assert expected_tokens(model) == expected
    with model.disable_adapter():
        assert generated_tokens(model) == expected_tokens(model) != expected


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("model_type", ["qwen2", "phi3"])
def test_flash_attention_serves_requests_by_their_lengths(monkeypatch, model_type, version):
    flash_reference.install(monkeypatch)
    model = streams_of(model_type, implementation="eager")
    expected = expected_tokens(model)
    assert generated_tokens(flash_reference.use_flash_attention(model, version)) == expected


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text"])
def test_flash_attention_is_refused_where_windows_would_hide_the_prefix(monkeypatch, model_type):
    flash_reference.install(monkeypatch)
    model = flash_reference.use_flash_attention(streams_of(model_type))
    message = "can't run streams through the sliding windows of .* under flash_attention_2, .*set_attn_implementation"
    with pytest.raises(ValueError, match=message):
        generated_tokens(model)


def test_flash_attention_is_not_chosen_for_streams_with_windows(monkeypatch):
    """By default transformers changes to flash attention where it is installed."""
    import transformers.generation.continuous_batching.continuous_api as api

    monkeypatch.setattr(api, "is_flash_attn_3_available", lambda **kwargs: True)
    model = streams_of("mistral")
    assert generated_tokens(model, PROMPTS[:1]) == expected_tokens(model, PROMPTS[:1])


def test_more_requests_than_pages_are_served_one_after_the_other():
    model = streams_of()
    prompts = [[token, token + 1, token + 2] for token in range(10, 34)]
    assert generated_tokens(model, prompts, config={"num_blocks": 4}) == expected_tokens(model, prompts)


def test_requests_with_the_same_beginning_share_pages():
    model = streams_of()
    prompts = [[*range(20, 37), last] for last in range(50, 54)]
    config = {"max_requests_per_batch": 1}
    assert generated_tokens(model, prompts, config=config) == expected_tokens(model, prompts)


def test_several_sequences_per_prompt_are_returned():
    model = streams_of()
    expected = [tokens for tokens in expected_tokens(model) for _ in range(3)]
    options = {"num_return_sequences": 3, "do_sample": True}
    assert generated_tokens(model, options={**options, "temperature": 1e-4}) == expected
    sampled = generated_tokens(model, options={**options, "temperature": 5.0}, config={"seed": 1})
    assert len(sampled) == 3 * len(PROMPTS)
    assert len(set(map(tuple, sampled))) > len(PROMPTS)


def test_the_adapter_that_is_active_serves():
    model = streams_of()
    model.add_adapter("one", ParScaleConfig(task_type="CAUSAL_LM", num_streams=1))
    with_second_adapter(model)
    seen = []
    for name in ("default", "second", "one", "default"):
        model.set_adapter(name)
        seen.append(generated_tokens(model))
        assert seen[-1] == expected_tokens(model)
    assert seen[0] == seen[3]
    assert seen[0] != seen[1] != seen[2] != seen[0]


def test_a_copied_and_an_unloaded_model_serve_too():
    model = streams_of()
    expected = generated_tokens(model)
    assert generated_tokens(copy.deepcopy(model)) == expected
    plain = model.unload()
    assert "init_continuous_batching" not in vars(plain)
    assert generated_tokens(plain) == expected_tokens(tiny_model()) != expected


def test_serving_puts_the_model_into_evaluation_mode():
    model = streams_of().train()
    generated_tokens(model, PROMPTS[:1])
    assert not any(module.training for module in model.get_base_model().modules())


def test_a_kept_manager_serves_its_adapter_again_and_no_other():
    model = with_second_adapter(streams_of(), num_streams=3)
    expected = expected_tokens(model)
    assert generated_tokens(model, persistent_manager=True) == expected
    kept = model._cached_continuous_batching_manager
    pages = kept.batch_processor.cache
    assert generated_tokens(model, persistent_manager=True) == expected
    assert model._cached_continuous_batching_manager.batch_processor.cache is pages
    message = "The manager of continuous batching serves the adapter 'default' and can't go on with "
    model.set_adapter("second")
    with pytest.raises(ValueError, match=f"{message}the adapter 'second': stop it, or call `destroy_cached_"):
        generated_tokens(model)
    with model.disable_adapter(), pytest.raises(ValueError, match=f"{message}the plain backbone"):
        generated_tokens(model)
    model.destroy_cached_continuous_batching_manager()
    assert generated_tokens(model) == expected_tokens(model) != expected


def test_requests_after_a_switch_of_the_adapter_fail_and_say_why():
    model = with_second_adapter(streams_of(), num_streams=3)
    generation_config, config = GenerationConfig(**GREEDY), ContinuousBatchingConfig(**SMALL)
    with model.continuous_batching_context_manager(
        generation_config=generation_config, continuous_batching_config=config, warmup=False
    ) as manager:
        manager.add_request(PROMPTS[0])
        assert manager.get_result(timeout=60).generated_tokens == expected_tokens(model, PROMPTS[:1])[0]
        model.set_adapter("second")
        manager.add_request(PROMPTS[0])
        error = manager.get_result(timeout=60).error
        assert "serves the adapter 'default' and can't go on with the adapter 'second'" in error


@pytest.mark.parametrize("case", ["p1", "p2"])
def test_the_published_class_serves(golden: Path, case):
    model = AutoModelForCausalLM.from_pretrained(golden / case, dtype=torch.float32).eval()
    assert generated_tokens(model) == expected_tokens(model)


@pytest.mark.parametrize("has_streams", [False, True], ids=["plain", "streams"])
def test_latent_attention_is_as_far_as_transformers_takes_it(has_streams):
    """transformers sizes its pages for keys and values of one size, which latent attention doesn't have."""
    model = tiny_model("deepseek_v3")
    model = with_streams(model, 3) if has_streams else model
    with pytest.raises(AssertionError, match="must have same slice shapes"):
        generated_tokens(model, PROMPTS[:1])


def test_adapters_per_request_are_refused():
    with pytest.raises(ValueError, match="Continuous batching runs one adapter for all requests, got `adapter_names`"):
        streams_of().generate_batch(PROMPTS, adapter_names=["default"] * len(PROMPTS))


def test_a_kept_manager_does_not_outlive_the_streams():
    model = streams_of()
    generated_tokens(model, persistent_manager=True)
    backbone = model.unload()
    assert getattr(backbone, "_cached_continuous_batching_manager", None) is None
    assert generated_tokens(backbone) == expected_tokens(backbone)
