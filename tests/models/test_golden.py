"""Equality with the published model: logits, loss, gradients and generated tokens of its own code."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import parscale_adapt  # noqa: F401
from parscale_adapt import ParScaleConfig


CASES = ("p1", "p2", "p4_left_padded")
IMPLEMENTATIONS = ("eager", "sdpa")


def load_published(folder, implementation):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation, dtype=torch.float32)
    return model, {}


def load_into_adapter(folder, implementation):
    """The published weights moved into our modules on a stock Qwen2."""
    published = json.loads((folder / "config.json").read_text())
    streams = {
        "num_streams": published["parscale_n"],
        "num_prefix_tokens": max(1, published["parscale_n_tokens"]),
        "aggregator_smoothing": published["parscale_attn_smooth"],
    }
    config = Qwen2Config(**{key: published[key] for key in published if hasattr(Qwen2Config(), key)})
    model = Qwen2ForCausalLM._from_config(config, attn_implementation=implementation)
    tensors = load_file(folder / "model.safetensors")
    renamed = {key: name_in_adapter(key) for key in tensors}
    model = get_peft_model(model, ParScaleConfig(task_type="CAUSAL_LM", train_backbone=True, **streams))
    missing, unexpected = model.load_state_dict({renamed[key]: tensors[key] for key in tensors}, strict=False)
    assert not unexpected
    assert all("lm_head" in key for key in missing)
    return model, renamed


def name_in_adapter(key):
    key = key.replace("aggregate_layer", "parscale.parscale_aggregator.default")
    for kind in "kv":
        key = key.replace(f"prefix_{kind}", f"parscale.parscale_prefix_{kind}.default.weight")
    return f"base_model.model.{key}"


@pytest.fixture(params=[load_published, load_into_adapter], ids=["published-class", "adapter"])
def load(request):
    return request.param


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_equal_the_published_model(golden, case, implementation, load):
    model, renamed = load(golden / case, implementation)
    expected = load_file(golden / case / "expected.safetensors")
    inputs = {key: expected[key] for key in ("input_ids", "attention_mask", "position_ids")}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    output = model(**inputs, labels=labels)

    visible = inputs["attention_mask"].bool()
    torch.testing.assert_close(output.logits[visible], expected["logits"][visible], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.loss.reshape(1), expected["loss"], atol=1e-5, rtol=0)

    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    stored = [key for key in expected if key.startswith("grad.")]
    assert stored or case == "p1"  # the plain backbone comes without gradients
    for key in stored:
        name = key.removeprefix("grad.")
        difference = (gradients[renamed.get(name, name)] - expected[key]).norm() / expected[key].norm()
        assert difference < 1e-3, key


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("key", "options"), [("greedy", {"num_beams": 1}), ("beam3", {"num_beams": 3})])
def test_generated_tokens_equal_the_published_model(golden, case, implementation, use_cache, key, options, load):
    model, _ = load(golden / case, implementation)
    expected = load_file(golden / case / "expected.safetensors")
    tokens = expected[f"generate.{key}"]
    model.eval()
    generated = model.generate(
        input_ids=expected["input_ids"],
        attention_mask=expected["attention_mask"],
        max_new_tokens=tokens.shape[1] - expected["input_ids"].shape[1],
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    assert torch.equal(generated, tokens)
