"""The parameter counts of the paper's 24 models, and of any transformers config."""

import pytest
from transformers import AutoConfig

from parscale_adapt.analysis.backbone_shape import load_shape, shape_of_config
from parscale_adapt.analysis.parameter_count import (
    PAPER_SHAPES,
    Qwen2Shape,
    adapter_parameters,
    backbone_parameters,
    parscale_parameters,
)


# By number of streams, in the order of PAPER_SHAPES (the tables of the paper's appendix).
PUBLISHED_COUNTS = {
    1: [535813376, 693753856, 1088376320, 1571472384, 2774773760, 4353203200],
    2: [538195842, 696738818, 1092762882, 1577522690, 2784937986, 4368529922],
    4: [540577412, 699722756, 1097148164, 1583571460, 2795100164, 4383854084],
    8: [545340552, 705690632, 1105918728, 1595669000, 2815424520, 4414502408],
}


@pytest.mark.parametrize("num_streams", PUBLISHED_COUNTS)
def test_all_published_counts_are_exact(num_streams):
    counts = [parscale_parameters(shape, num_streams) for shape in PAPER_SHAPES.values()]
    assert counts == PUBLISHED_COUNTS[num_streams]


@pytest.mark.parametrize("size", PAPER_SHAPES)
def test_a_transformers_config_of_a_published_size_has_the_published_count(size):
    shape = PAPER_SHAPES[size]
    config = AutoConfig.for_model(
        "qwen2",
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=True,
    )
    measured = shape_of_config(config, size)
    assert [measured.params_with_streams(count) for count in (1, 2, 4, 8)] == [
        parscale_parameters(shape, count) for count in (1, 2, 4, 8)
    ]
    published = load_shape(size)
    # The cost script has no biases; everything else that the cost needs is read off the weights.
    biases = shape.hidden_size + 2 * shape.key_value_size
    assert measured.vector_weights == published.vector_weights + biases
    for name in ("attention_weights", "mlp_weights", "embedding_weights", "final_weights", "key_value_size"):
        assert getattr(measured, name) == getattr(published, name)


TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}


@pytest.mark.parametrize(
    ("model_type", "options", "key_value_size", "intermediate_size"),
    [
        ("llama", {"num_key_value_heads": 2, "intermediate_size": 48}, 16, 48),
        ("qwen3", {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 16}, 32, 48),
        ("gemma3_text", {"num_key_value_heads": 1, "intermediate_size": 48, "head_dim": 16}, 16, 48),
        ("phi3", {"num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0}, 16, 48),
        ("gpt2", {}, 32, 128),
        ("gpt_neox", {"intermediate_size": 48}, 32, 48),
        ("falcon", {"multi_query": True, "new_decoder_architecture": False}, 8, 128),
    ],
)
def test_other_architectures_are_read_off_their_weights(model_type, options, key_value_size, intermediate_size):
    shape = shape_of_config(AutoConfig.for_model(model_type, **TINY, **options), model_type)
    assert (shape.key_value_size, shape.intermediate_size) == (key_value_size, intermediate_size)
    assert (shape.num_layers, shape.vocab_size, shape.hidden_size) == (3, 96, 32)
    layers = 3 * (shape.attention_weights + shape.mlp_weights + shape.vector_weights)
    assert shape.num_params == layers + shape.final_weights
    assert shape.final_weights in (32, 64)


def test_an_untied_output_layer_is_stored_but_not_counted():
    tied, untied = (
        shape_of_config(AutoConfig.for_model("llama", **TINY, intermediate_size=48, tie_word_embeddings=tie), "llama")
        for tie in (True, False)
    )
    assert untied.num_params == tied.num_params
    assert untied.embedding_weights == 2 * tied.embedding_weights == 2 * 96 * 32


@pytest.mark.parametrize("model_type", ["mixtral", "mamba", "deepseek_v3"])
def test_architectures_outside_the_formulas_are_refused(model_type):
    config = AutoConfig.for_model(model_type)
    config.num_hidden_layers = 4
    with pytest.raises(ValueError, match=r"published formulas"):
        shape_of_config(config, model_type)


def test_an_encoder_is_refused():
    with pytest.raises(ValueError, match=r"t5.*not a causal language model"):
        shape_of_config(AutoConfig.for_model("t5"), "mine")


def test_widening_keeps_depth_and_reaches_the_size():
    shape = load_shape("1.6B")
    wide = shape.scaled_to(2.9e9)
    assert wide.num_layers == shape.num_layers
    layers = wide.num_layers * (wide.attention_weights + wide.mlp_weights)
    rest = shape.num_params - shape.num_layers * (shape.attention_weights + shape.mlp_weights)
    assert layers + rest * wide.hidden_size / shape.hidden_size == pytest.approx(2.9e9)
    assert shape.scaled_to(shape.num_params).hidden_size == pytest.approx(shape.hidden_size)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Qwen2Shape(0, 4864), r"`hidden_size` of a backbone must be at least 1, got 0"),
        (lambda: Qwen2Shape(100, 400, num_heads=16), r"multiple of `num_heads`, got 100 and 16"),
        (lambda: parscale_parameters(PAPER_SHAPES["0.5B"], 0), r"streams must be at least 1"),
        (lambda: load_shape("1.7B"), r"`1.7B` is neither one of the paper's sizes \(0.5B"),
        (lambda: load_shape("0.5B").scaled_to(-1), r"positive number of parameters, got -1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_stream_adds_nothing():
    shape = PAPER_SHAPES["0.5B"]
    added = adapter_parameters(num_layers=36, hidden_size=896, key_value_size=112, num_streams=1)
    assert added == parscale_parameters(shape, 1) - backbone_parameters(shape) == 0


def test_a_config_file_or_its_folder_is_read(tmp_path):
    AutoConfig.for_model("llama", **TINY, intermediate_size=48).save_pretrained(tmp_path / "small")
    from_folder = load_shape(str(tmp_path / "small"))
    assert from_folder == load_shape(str(tmp_path / "small" / "config.json"))
    assert from_folder.name == "small"
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"transformers cannot read .*config.json"):
        load_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ValueError, match=r"transformers cannot read .*no_such_model"):
        load_shape(str(tmp_path))
