"""Streams that start as the backbone.

Trained language models have hidden states with a direction in common, and so have their queries; random ones don't, and
no key is far from all of their queries. Here the embeddings are moved by one vector to make up for that.
"""

import logging

import pytest
import torch
from peft import LoraConfig, PeftModel
from support.oracle import file_tensors
from support.tiny_models import random_tokens, tiny_model, with_streams

from parscale_adapt import ParScaleConfig
from parscale_adapt.tuner import near_identity


LOGGER = "parscale_adapt.tuner.near_identity"
N = 8
HYBRID = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "tie_word_embeddings": False,
}
BACKBONES = {
    "qwen2": {"head_dim": 16},
    "llama": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},  # windows, norms of queries and keys, another scale
    "gemma2": {"head_dim": 16, "attn_logit_softcapping": 5.0, "sliding_window": 5},
    "qwen3_moe": {"head_dim": 16},
    "qwen3_5_text": HYBRID,
    "gpt2": {},
    "gpt_oss": {},  # a learned sink in every head
    "deepseek_v3": {},  # keys and values of different sizes
}


def backbone_like_a_trained_one(model_type: str = "qwen2", **changes):
    implementation = "eager" if model_type in ("gpt_oss", "gemma2") else "sdpa"
    model = tiny_model(model_type, implementation, **{**BACKBONES[model_type], **changes})
    strength = 4 if model_type in ("gpt_oss", "qwen3_5_text") else 2
    torch.manual_seed(3)
    embeddings = model.get_input_embeddings().weight.data
    embeddings += strength * embeddings.std() * torch.randn(embeddings.shape[1])
    return model


@torch.no_grad()
def compare(model) -> tuple[float, float]:
    """Loss with streams minus that of the backbone, computed by transformers on new text, and their divergence."""
    with model.disable_adapter():
        rows = near_identity.generate_tokens(model.get_base_model(), 16, 32)
        expected = model(input_ids=rows, labels=rows)
    found = model(input_ids=rows, labels=rows)
    divergence = torch.nn.functional.kl_div(
        found.logits.log_softmax(-1), expected.logits.log_softmax(-1), log_target=True, reduction="none"
    )
    return (found.loss - expected.loss).item(), divergence.sum(-1).mean().item()


@pytest.mark.parametrize("model_type", BACKBONES)
def test_the_loss_before_the_first_step_is_that_of_the_backbone(model_type, caplog):
    caplog.set_level(logging.INFO, LOGGER)
    fields = {"num_prefix_tokens": N, "num_streams": 3}
    model = with_streams(backbone_like_a_trained_one(model_type), init_weights="near_identity", **fields)
    difference, divergence = compare(model)
    assert abs(difference) <= near_identity.TOLERANCE
    other = with_streams(backbone_like_a_trained_one(model_type), init_weights="tokens", **fields)
    assert divergence < compare(other)[1] / 5
    measured = model.base_model.near_identity_of["default"]
    assert abs(measured.difference) <= near_identity.TOLERANCE
    assert f"by {measured.difference:+.4f} nats on 496 generated tokens" in caplog.text


@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text", "gpt2"])
def test_streams_differ_in_their_first_gradients(model_type):
    fields = {"num_prefix_tokens": N, "init_weights": "near_identity", "aggregator": "mean"}  # weights streams alike
    model = with_streams(backbone_like_a_trained_one(model_type), 3, **fields)
    rows = random_tokens(2, 12)
    model(input_ids=rows, labels=rows).loss.backward()
    gradients = [p.grad.flatten(1) for name, p in model.named_parameters() if "parscale_prefix" in name]
    assert len(gradients) == 4
    for gradient in gradients:
        assert (gradient.norm(dim=1) > 0).all()
        cosines = torch.nn.functional.cosine_similarity(gradient, gradient.roll(1, 0))
        assert cosines.max() < 0.999


def test_a_difference_that_is_too_large_is_said(caplog):
    model = with_streams(tiny_model(), init_weights="near_identity", num_prefix_tokens=N)
    measured = model.base_model.near_identity_of["default"]
    assert abs(measured.difference) > near_identity.TOLERANCE
    assert [record.levelname for record in caplog.records if record.name == LOGGER] == ["WARNING"]
    assert f"{measured.difference:+.4f} nats" in caplog.text
    assert "or start with `init_weights='tokens'`" in caplog.text


def test_queries_far_behind_the_prefix_turn_away_from_it_too():
    model = with_streams(backbone_like_a_trained_one(), init_weights="near_identity", num_prefix_tokens=N)
    with model.disable_adapter(), torch.no_grad():
        rows = near_identity.generate_tokens(model.get_base_model(), 16, 16)
        positions = torch.arange(112, 128).expand(16, -1)
        expected = model(input_ids=rows, position_ids=positions).logits.log_softmax(-1)
    with torch.no_grad():
        found = model(input_ids=rows, position_ids=positions).logits.log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    assert 0 < divergence < near_identity.TOLERANCE


def test_the_difference_is_measured_on_text_that_nothing_was_fitted_to(monkeypatch):
    fitted, seen = [], []
    fit, probabilities = near_identity._fit, near_identity._log_probabilities
    monkeypatch.setattr(
        near_identity, "_fit", lambda model, rows, *args: fitted.append(rows) or fit(model, rows, *args)
    )
    monkeypatch.setattr(
        near_identity, "_log_probabilities", lambda model, rows: seen.append(rows) or probabilities(model, rows)
    )
    with_streams(backbone_like_a_trained_one(), init_weights="near_identity", num_prefix_tokens=N)
    assert all(rows is fitted[0] for rows in fitted)
    measured = seen[-1]
    assert not any((row == other).all() for row in measured for other in torch.cat([fitted[0], seen[0]]))


def test_a_second_adapter_is_fitted_to_the_plain_backbone_and_the_first_stays_active():
    model = with_streams(backbone_like_a_trained_one(), num_streams=4, num_prefix_tokens=N)
    model.add_adapter("second", ParScaleConfig(num_streams=2, num_prefix_tokens=N, init_weights="near_identity"))
    assert model.get_base_model().model.parscale.current_adapter == "default"
    assert set(model.base_model.near_identity_of) == {"second"}
    model.set_adapter("second")
    assert abs(compare(model)[0]) <= near_identity.TOLERANCE


def test_the_start_stays_in_bfloat16_and_with_a_shared_lora():
    backbone = backbone_like_a_trained_one().bfloat16()
    model = with_streams(backbone, init_weights="near_identity", num_prefix_tokens=N, lora=LoraConfig(r=2))
    assert abs(model.base_model.near_identity_of["default"].difference) <= near_identity.TOLERANCE


def test_a_saved_adapter_loads_without_another_fit(tmp_path, monkeypatch):
    model = with_streams(backbone_like_a_trained_one(), init_weights="near_identity", num_prefix_tokens=N)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(near_identity, "_fit", None)
    loaded = PeftModel.from_pretrained(backbone_like_a_trained_one(), tmp_path)
    expected, found = file_tensors(model), file_tensors(loaded)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
