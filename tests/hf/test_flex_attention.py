"""flex_attention on the CPU, where torch has no backward for it.

The kernels that it compiles take half a minute, so one test runs them; elsewhere the same calls run uncompiled.
"""

import os
import shutil

import pytest
import torch
from peft import get_peft_model
from support.oracle import logits_by_hand
from support.outputs import GREEDY, close, logits
from support.tiny_models import random_tokens, tiny_model, with_streams
from transformers import StaticCache

from parscale_adapt import ParScaleConfig
from parscale_adapt.hf import prefixed_attention
from parscale_adapt.hf.prefixed_attention import AttentionInputs


SIZES = {"hidden_size": 64, "head_dim": 16}
CHANGES = {
    "qwen2": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": None,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
MODEL_TYPES = tuple(CHANGES)


@pytest.fixture
def uncompiled():
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def sizes_of(model_type):
    return SIZES | CHANGES[model_type]


def flex_streams(model_type, num_streams=3, **fields):
    model = with_streams(tiny_model(model_type, "eager", **sizes_of(model_type)), num_streams, **fields)
    model.set_attn_implementation("flex_attention")
    return model


def left_padded():
    input_ids, mask = random_tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


def with_positions(inputs):
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return {**inputs, "position_ids": positions, "use_cache": False}


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch compiles flex_attention with g++: none was found"
)
@torch.no_grad()
@torch._dynamo.config.patch(automatic_dynamic_shapes=False)  # torch 2.13 can't compile changing lengths for any model
@pytest.mark.slow
def test_compiled_kernels_give_the_tokens_and_logits_of_eager_attention():
    model = flex_streams("qwen2")
    options = {**GREEDY, "max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True}
    result = model.generate(**left_padded(), **options)
    model.set_attn_implementation("eager")
    expected = model.generate(**left_padded(), use_cache=False, **options)
    assert torch.equal(result.sequences, expected.sequences)
    close(torch.stack(result.logits), torch.stack(expected.logits))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_padded_streams_equal_one_forward_per_stream_mixed_by_hand(model_type):
    model, inputs = flex_streams(model_type), left_padded()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = logits_by_hand(model, model_type, sizes_of(model_type), **inputs, position_ids=positions)
    visible = inputs["attention_mask"].bool()
    result = logits(model, **with_positions(inputs))
    assert result.isfinite().all()
    close(result[visible], expected[visible])


@pytest.mark.usefixtures("uncompiled")
def test_a_prefix_may_be_longer_than_the_padded_tokens():
    model, inputs = flex_streams("mistral", num_prefix_tokens=12), left_padded()
    model.set_attn_implementation("eager")
    expected = logits(model, **with_positions(inputs))
    model.set_attn_implementation("flex_attention")
    close(logits(model, **with_positions(inputs)), expected)


@pytest.mark.usefixtures("uncompiled")
def test_streams_without_a_prefix_get_the_stock_mask():
    config = ParScaleConfig(task_type="CAUSAL_LM", num_streams=3, stream_transform="bitfit", init_std=0.5)
    model = get_peft_model(tiny_model("mistral", "eager", **sizes_of("mistral")), config)
    model.set_attn_implementation("flex_attention")
    expected = logits_by_hand(model, "mistral", sizes_of("mistral"), input_ids=random_tokens())
    close(model(input_ids=random_tokens()).logits, expected)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_packed_document_sees_the_whole_prefix_and_no_other_document(model_type):
    model = flex_streams(model_type)
    documents = [random_tokens(1, length, seed=length) for length in (7, 1, 6)]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents]).unsqueeze(0)
    packed = model(input_ids=torch.cat(documents, 1), position_ids=positions, use_cache=False).logits
    alone = [logits_by_hand(model, model_type, sizes_of(model_type), input_ids=document) for document in documents]
    close(packed, torch.cat(alone, 1))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_cached_generation_gives_the_tokens_of_eager_attention_without_a_cache(model_type, num_beams):
    model = flex_streams(model_type)
    result = model.generate(**left_padded(), **GREEDY, num_beams=num_beams)
    model.set_attn_implementation("eager")
    expected = model.generate(**left_padded(), **GREEDY, num_beams=num_beams, use_cache=False)
    assert torch.equal(result, expected)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2", "mistral"])
def test_decoding_copies_no_key(model_type, is_padded, monkeypatch):
    """The prefix is put in front of keys once, for the prompt; the stock function, which wants one tensor, runs then only."""
    model, lengths = flex_streams(model_type), []
    put = prefixed_attention._put_prefix_first

    def counted(inputs):
        lengths.append(inputs.query.shape[-2])
        return put(inputs)

    monkeypatch.setattr(prefixed_attention, "_put_prefix_first", counted)
    model.generate(**(left_padded() if is_padded else {"input_ids": random_tokens(2, 9)}), **GREEDY)
    assert set(lengths) == {left_padded()["input_ids"].shape[1]}


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_attention_sinks_are_left_to_the_stock_function(implementation):
    def stock(module, query, key, value, mask, **options):
        assert options["s_aux"] is sinks
        return query.transpose(1, 2), None

    sinks, states = torch.zeros(2), torch.randn(1, 2, 1, 4)
    cached, prefix = torch.randn(1, 2, 5, 4), (torch.randn(1, 2, 3, 4),) * 2
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    inputs = AttentionInputs(stock, None, states, cached, cached, mask, {"s_aux": sinks}, prefix)
    output, _ = prefixed_attention.FAMILIES[implementation](inputs)
    assert torch.equal(output, states.transpose(1, 2))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_static_cache_and_pieces_give_the_logits_of_one_call(model_type):
    """Gemma 2 caps its scores, which the stock function does, with a mask that is added to them."""
    model, input_ids = flex_streams(model_type), random_tokens(2, 12)
    expected = model(input_ids=input_ids, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    pieces = [model(input_ids=piece, past_key_values=cache).logits for piece in input_ids.split([7, 1, 4], dim=1)]
    close(torch.cat(pieces, 1), expected)


@pytest.mark.usefixtures("uncompiled")
def test_a_single_stream_and_a_disabled_adapter_are_the_plain_backbone():
    expected = logits(tiny_model("mistral", "flex_attention", **sizes_of("mistral")), **with_positions(left_padded()))
    model = flex_streams("mistral")
    with model.disable_adapter():
        assert torch.equal(logits(model, **with_positions(left_padded())), expected)
    model.add_adapter("one", ParScaleConfig(task_type="CAUSAL_LM", num_streams=1))
    model.set_adapter("one")
    assert torch.equal(logits(model, **with_positions(left_padded())), expected)


@pytest.mark.usefixtures("uncompiled")
def test_mixed_adapters_are_refused():
    model = flex_streams("qwen2")
    message = r"`adapter_names` can't mix adapters under flex_attention, .* `attn_implementation=\"sdpa\"`"
    with pytest.raises(ValueError, match=message):
        model(input_ids=random_tokens(), adapter_names=["default", "__base__"])
    model.set_attn_implementation("sdpa")
    assert model(input_ids=random_tokens(), adapter_names=["default", "__base__"]).logits.isfinite().all()
