import pytest
import torch
from peft import get_peft_model
from support.tiny_models import ARCHITECTURES, random_tokens, tiny_config, tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from parscale_adapt import ParScaleConfig
from parscale_adapt.hf.backbone import AttentionShape, evaluating, find_decoder, observe_states, probe_backbone


EXPECTED_SHAPES = {  # heads, key size, value size
    "qwen3": (2, 12, 12),
    "mistral": (2, 8, 8),
    "gpt2": (4, 8, 8),
    "opt": (4, 8, 8),
    "deepseek_v3": (4, 12, 6),
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_attention_module_of_the_backbone_is_found(model_type):
    model = tiny_model(model_type, "eager")
    backbone = probe_backbone(model)
    assert model.get_submodule(backbone.decoder_name) is model.get_decoder()
    assert backbone.hidden_size == 32
    assert len(backbone.attention_shapes) == 2
    for name, shape in backbone.attention_shapes.items():
        assert "attention" in type(model.get_submodule(name)).__name__.lower()
        assert shape == AttentionShape(*EXPECTED_SHAPES.get(model_type, (2, 8, 8)))


def test_the_hidden_size_is_that_of_the_decoders_output():
    assert probe_backbone(tiny_model("opt", word_embed_proj_dim=16)).hidden_size == 16


def test_an_lm_head_that_calls_itself_decoder_is_not_taken_for_one():
    model = tiny_model("modernbert-decoder", local_attention=4)
    assert not hasattr(model.get_decoder(), "config")
    assert probe_backbone(model).decoder_name == "model"


def test_observed_states_are_those_that_the_backbone_caches():
    model = tiny_model()
    expected = model(input_ids=random_tokens()).past_key_values
    observed = observe_states(model, random_tokens())
    for layer, name in enumerate(("model.layers.0.self_attn", "model.layers.1.self_attn")):
        torch.testing.assert_close(observed.states[name].key, expected.layers[layer].keys)
        torch.testing.assert_close(observed.states[name].value, expected.layers[layer].values)


def test_probing_runs_in_evaluation_mode_and_gives_every_module_its_own_mode_back():
    model = tiny_model(attention_dropout=0.9).train()
    model.lm_head.eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    probe_backbone(model)
    assert model.training
    assert model.model.layers[0].self_attn.training
    assert not model.lm_head.training


def from_config(auto_class, model_type, **sizes):
    return auto_class.from_config(tiny_config(model_type, **sizes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_config(AutoModelForSeq2SeqLM, "t5"), "T5ForConditionalGeneration is an encoder-decoder model"),
        (lambda: from_config(AutoModelForSeq2SeqLM, "bart"), "BartForConditionalGeneration is an encoder-decoder"),
        (lambda: from_config(AutoModelForMaskedLM, "bert"), "BertForMaskedLM is not a causal LM, though .* LM head"),
    ],
)
def test_models_whose_decoder_does_not_stand_alone_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        find_decoder(make())


def test_something_else_than_a_transformers_model_is_refused():
    with pytest.raises(TypeError, match="`model` must be a transformers model, got Linear"):
        find_decoder(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "auto_class", [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification]
)
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_encoders_are_refused_whatever_their_head(auto_class, model_type):
    model = from_config(auto_class, model_type)
    with pytest.raises(ValueError, match=f"{type(model).__name__} is an encoder, in which tokens see later ones"):
        probe_backbone(model)


def test_a_model_of_images_alone_is_refused():
    model = AutoModel.from_config(
        AutoConfig.for_model("vit", hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match=r"ViTModel reads its tokens from .* and not from one embedding"):
        find_decoder(model)


@pytest.mark.parametrize("model_type", ["mamba", "bloom", "falcon"])
def test_a_model_whose_attention_cannot_be_reached_is_refused_with_the_reason(model_type):
    model = from_config(AutoModelForCausalLM, model_type)
    message = f"{type(model).__name__} has no attention that streams can reach: .* nowhere to put a prefix"
    assert probe_backbone(model).attention_shapes == {}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, ParScaleConfig())


def test_a_model_whose_attention_picks_single_keys_is_refused():
    sizes = {"index_topk": 3, "index_n_heads": 2, "index_head_dim": 8, "first_k_dense_replace": 2}
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
    model = tiny_model("deepseek_v32", "eager", num_key_value_heads=4, **sizes, **latent)
    with pytest.raises(ValueError, match=r"DeepseekV32Attention picks single keys .`indices`."):
        probe_backbone(model)
