"""`merge_and_unload` with several streams: one model that owns them, on the backbone's own parameters."""

import copy

import pytest
import torch
from support.outputs import logits
from support.tiny_models import random_tokens, tiny_model, with_streams
from transformers import AutoConfig, Qwen2ForCausalLM

from parscale_adapt.models.standalone import standalone_classes, standalone_name


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "deepseek_v3", "qwen3_moe"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_merged_model_computes_the_same_without_peft(model_type, implementation):
    model = with_streams(tiny_model(model_type, implementation), num_streams=3)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert not [name for name, _ in merged.named_modules() if "parscale_" in name]
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged), expected, atol=1e-6, rtol=0)
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    without_cache = merged.generate(random_tokens(), use_cache=False, **greedy)
    assert torch.equal(merged.generate(random_tokens(), **greedy), without_cache)


def test_the_backbone_becomes_the_merged_model_and_keeps_its_parameters():
    backbone = tiny_model(tie_word_embeddings=True)
    before = dict(backbone.named_parameters())
    merged = with_streams(backbone).merge_and_unload()
    assert merged is backbone
    assert isinstance(merged, Qwen2ForCausalLM)
    assert type(merged).__name__ == "ParScaleQwen2ForCausalLM"
    assert type(merged.model).__name__ == "ParScaleQwen2Model"
    after = dict(merged.named_parameters())
    assert {name for name in after if ".parscale." not in name} == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_classes_of_one_backbone_are_the_same_every_time():
    first, second = (with_streams(tiny_model(seed=seed)).merge_and_unload() for seed in (0, 1))
    assert type(first) is type(second)
    assert type(first.config) is type(second.config)


def test_the_adapter_to_keep_can_be_named():
    model = with_streams(tiny_model(), num_streams=2, seed=1)
    other = with_streams(tiny_model(), num_streams=4, seed=5)
    expected = logits(other)
    model.add_adapter("other", copy.deepcopy(other.peft_config["default"]))
    state = {
        name.replace(".default.", ".other."): value for name, value in other.state_dict().items() if "parscale" in name
    }
    model.load_state_dict(state, strict=False)
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["other"])), expected)


@pytest.mark.parametrize("names", [["default", "other"], ["unknown"]])
def test_anything_but_one_loaded_adapter_is_refused_and_changes_nothing(names):
    model = with_streams(tiny_model())
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    expected = logits(model)
    with pytest.raises(
        ValueError, match=r"Streams of one loaded adapter can be merged, got .*: name one of \['default', "
    ):
        model.merge_and_unload(adapter_names=names)
    assert torch.equal(logits(model), expected)


def test_a_reparameterized_prefix_is_folded():
    model = with_streams(tiny_model(), init_weights="reparameterized")
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    assert merged.get_parameter("model.layers.0.self_attn.parscale.prefix_k.weight").shape == (2, 2, 3, 8)


def test_a_merged_model_trains(tmp_path):
    merged = with_streams(tiny_model()).merge_and_unload().train()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    merged.gradient_checkpointing_enable()
    tokens = random_tokens()
    merged(tokens, labels=tokens).loss.backward()
    for name, parameter in merged.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_hidden_states_of_the_base_model_are_the_mixed_ones():
    merged = with_streams(tiny_model(), num_streams=3).merge_and_unload()
    with torch.no_grad():
        states = merged.model(random_tokens()).last_hidden_state
        assert states.shape == (2, 9, 32)
        assert torch.equal(merged.lm_head(states), logits(merged))


def test_from_the_configuration_alone_streams_start_as_new_ones():
    merged = with_streams(tiny_model()).merge_and_unload()
    torch.manual_seed(0)
    fresh = type(merged)(merged.config)
    prefix = fresh.get_parameter("model.layers.0.self_attn.parscale.prefix_k.weight")
    assert 0.01 < prefix.std().item() < 0.03
    assert torch.equal(fresh.get_parameter("model.parscale.aggregator.2.bias"), torch.zeros(2))
    assert logits(fresh).isfinite().all()


# Falcon H1 computes buffers of its layers when its decoder is initialized.
FALCON_H1 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}


# Llama 4 calls its base model by a name that its text model doesn't have.
LLAMA_4 = {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48}


@pytest.mark.parametrize(
    ("model_type", "changes"), [("qwen2", {}), ("opt", {}), ("falcon_h1", FALCON_H1), ("llama4_text", LLAMA_4)]
)
def test_a_saved_model_is_read_back_by_its_own_class(tmp_path, model_type, changes):
    merged = with_streams(tiny_model(model_type, **changes)).merge_and_unload()
    merged.save_pretrained(tmp_path)
    again, info = type(merged).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).parscale == merged.config.parscale
    buffers = dict(again.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in merged.named_buffers())
    torch.testing.assert_close(logits(again.eval()), logits(merged))


def test_a_backbone_of_code_from_elsewhere_is_refused_and_left_as_it_was():
    class OwnForCausalLM(Qwen2ForCausalLM):
        pass

    model = with_streams(OwnForCausalLM(tiny_model().config).eval())
    expected = logits(model)
    with pytest.raises(ValueError, match=r"classes are part of transformers, got .*\.OwnForCausalLM"):
        model.merge_and_unload()
    assert torch.equal(logits(model), expected)


def test_a_quantized_backbone_is_refused():
    backbone = tiny_model()
    backbone.is_quantized = True
    with pytest.raises(ValueError, match="in full precision, got a quantized one"):
        standalone_classes(backbone, "model")


@pytest.mark.parametrize(
    ("in_adapter", "in_checkpoint"),
    [
        ("model.layers.0.self_attn.parscale_prefix_k", "model.layers.0.self_attn.parscale.prefix_k.weight"),
        ("model.parscale_aggregator.0.weight", "model.parscale.aggregator.0.weight"),
        ("model.layers.0.mlp.up_proj.parscale_lora_A", "model.layers.0.mlp.up_proj.parscale.lora.lora_A"),
        ("model.layers.0.mlp.up_proj.parscale_bias", "model.layers.0.mlp.up_proj.parscale.bias.bias"),
    ],
)
def test_names_in_a_checkpoint(in_adapter, in_checkpoint):
    assert standalone_name(in_adapter) == in_checkpoint
