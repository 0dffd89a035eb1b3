"""What can't be served is refused in one sentence before weights load: the folders here hold none."""

import pytest
from engines import copy_export, engine


OPTIONS = {
    "LoRA adapters": {"enable_lora": True},
    "speculative decoding": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    },
    "quantized weights (fp8)": {"quantization": "fp8"},
    "a quantized cache (fp8)": {"kv_cache_dtype": "fp8"},
    "pipeline parallelism": {"pipeline_parallel_size": 2},
}
EXPORTS = {
    "which is newer than this parscale-vllm": {"version": "99.0.0"},
    "got `stream_transform` 'lora'": {"stream_transform": "lora"},
    "got a window of 64 tokens in a mistral export": {"model_type": "parscale_mistral", "sliding_window": 64},
    "got sliding_attention in a gemma3_text export": {
        "model_type": "parscale_gemma3_text",
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "caches latent keys, among which a prefix has no place": {"kv_lora_rank": 8},
    "such as 16, 32, 48 or 64, to fill whole blocks of vLLM's cache, got 20": {"num_prefix_tokens": 20},
    "must have one attention module a layer": {"masks_per_row": True},
}


def refused(folder, sentence, **options):
    with pytest.raises((ValueError, RuntimeError)) as error, engine(folder, **options):
        pass
    assert sentence in str(error.value)


@pytest.fixture(scope="module")
def without_weights(four_streams, tmp_path_factory):
    return copy_export(four_streams, tmp_path_factory.mktemp("refused") / "export", without=("model.safetensors",))


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_do_not_go_with_streams(without_weights, option):
    refused(without_weights, f"can't be served with {option}", **OPTIONS[option])


@pytest.mark.parametrize("sentence", EXPORTS)
def test_exports_that_can_not_be_served(four_streams, tmp_path, sentence):
    folder = copy_export(four_streams, tmp_path / "export", ("model.safetensors",), **EXPORTS[sentence])
    refused(folder, sentence)


def test_a_block_size_that_does_not_divide_the_prefix(without_weights):
    refused(without_weights, "--block-size must be one of 16 to fit a prefix of 16 tokens, got 64", block_size=64)


def test_an_export_without_its_reference(four_streams, tmp_path):
    folder = copy_export(four_streams, tmp_path / "export", ("model.safetensors", "reference_logits.safetensors"))
    refused(folder, "lacks reference_logits.safetensors, without which nothing shows that the streams are served")


def test_another_version_of_vllm():
    from parscale_vllm.configuration import refuse_untested_vllm

    refuse_untested_vllm("0.32.1")
    with pytest.raises(ValueError, match=r"needs vLLM 0\.32, whose inner interfaces it builds on, got 0\.33\.0"):
        refuse_untested_vllm("0.33.0")
