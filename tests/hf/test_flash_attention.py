"""flash_attention_2 and 3 on a reference in plain torch; expected are plain backbones and eager streams."""

import pytest
import torch
from support import flash_reference
from support.flash_reference import use_flash_attention
from support.oracle import logits_by_hand
from support.outputs import GREEDY, close
from support.tiny_models import random_tokens, tiny_model, with_streams
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from parscale_adapt import ParScaleConfig
from parscale_adapt.core.packed_documents import put_prefix_before_documents


WIDE = {"sliding_window": 64}
CHANGES = {
    "qwen2": {},
    "mistral": WIDE,
    "gemma2": {**WIDE, "head_dim": 8, "attn_logit_softcapping": 2.0},
    "gpt_oss": WIDE,
    "deepseek_v3": {},
}
MODEL_TYPES = tuple(CHANGES)
LENGTHS = (7, 1, 4)
STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.fixture(autouse=True)
def _flash(monkeypatch):
    flash_reference.install(monkeypatch)


def backbone(model_type, implementation="eager", **changes):
    return tiny_model(model_type, implementation, **CHANGES[model_type] | changes)


def eager_streams(model_type, num_streams=3, **changes):
    return with_streams(backbone(model_type, **changes), num_streams)


def padded(side):
    """Tokens and a mask of three samples, two of them padded."""
    input_ids, mask = random_tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    for sample, num_padding in ((1, 3), (2, 7)):
        mask[sample, slice(0, num_padding) if side == "left" else slice(9 - num_padding, 9)] = 0
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def packed(lengths=LENGTHS):
    """Documents in one row, told apart by positions alone."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {"input_ids": random_tokens(1, sum(lengths)), "position_ids": positions.unsqueeze(0)}


def packed_by_lengths(lengths=LENGTHS):
    """The same, as transformers' and TRL's padding-free collators give it."""
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    lengths = {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    return packed(starts.diff().tolist()) | lengths


INPUTS = {
    "unpadded": lambda: {"input_ids": random_tokens(2, 9)},
    "left": lambda: padded("left"),
    "right": lambda: padded("right"),
    "mask and lengths": lambda: packed_by_lengths() | padded("left"),  # the mask tells
    "packed": packed,
    "lengths": packed_by_lengths,
    "one document": lambda: packed_by_lengths((9,)),
    "two documents": lambda: packed_by_lengths((5, 4)),
}


def documents_of(inputs):
    """The tokens of every sample or packed document without padding, one `[1, length]` each."""
    if "attention_mask" in inputs:
        return [row[mask.bool()][None] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    tokens, positions = inputs["input_ids"], inputs.get("position_ids")
    if positions is None:
        return list(tokens.split(1))
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    return [tokens[:, start:end] for start, end in zip(starts, [*starts[1:], tokens.shape[1]])]


def run_alone(model, inputs):
    """Logits `[tokens, vocabulary]` of every document alone."""
    return torch.cat([model(input_ids=document, use_cache=False).logits[0] for document in documents_of(inputs)])


def run(model, inputs, **options):
    """Logits `[tokens, vocabulary]` of real tokens under flash attention."""
    visible = inputs.get("attention_mask", torch.ones(inputs["input_ids"].shape)).bool()
    return use_flash_attention(model)(**inputs, **options).logits[visible]


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_reference_gives_plain_backbones_their_eager_logits(model_type, name):
    model, inputs = backbone(model_type), INPUTS[name]()
    expected = run_alone(model, inputs)
    close(run(model, inputs, use_cache=False), expected)


@pytest.mark.parametrize("name", ["unpadded", "left", "packed", "lengths"])
def test_the_reference_knows_windows(name):
    model, inputs = backbone("mistral", sliding_window=5), INPUTS[name]()
    expected = run_alone(model, inputs)
    close(run(model, inputs, use_cache=False), expected)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_document_gives_the_logits_that_it_gives_alone_under_eager_attention(model_type, name, use_cache):
    model, inputs = eager_streams(model_type), INPUTS[name]()
    expected = run_alone(model, inputs)
    close(run(model, inputs, use_cache=use_cache), expected)
    with torch.no_grad(), model.disable_adapter():
        assert (run(model, inputs) - expected).abs().max() > 0.1


@pytest.mark.parametrize("num_streams", [2, 4])
def test_streams_equal_one_forward_per_stream_mixed_by_hand(num_streams):
    model, inputs = eager_streams("qwen2", num_streams), packed_by_lengths()
    expected = [logits_by_hand(model, input_ids=document)[0] for document in documents_of(inputs)]
    close(run(model, inputs, use_cache=False), torch.cat(expected))


@pytest.mark.parametrize("name", ["unpadded", "left", "packed", "lengths"])
@pytest.mark.parametrize("model_type", ["qwen2", "gpt_oss"])
def test_gradients_equal_those_of_eager_attention(model_type, name):
    model, inputs = eager_streams(model_type), INPUTS[name]()
    run_alone(model, inputs).square().mean().backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    model.train()
    run(model, inputs).square().mean().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0
            torch.testing.assert_close(parameter.grad, expected[key], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 3}, STATIC], ids=str)
@pytest.mark.parametrize("model_type", ["qwen2", "mistral", "gpt_oss", "deepseek_v3"])
def test_cached_generation_gives_the_tokens_of_eager_attention_without_a_cache(model_type, options):
    model, inputs = eager_streams(model_type), padded("left")
    del inputs["position_ids"]
    expected = model.generate(**inputs, **GREEDY, use_cache=False, num_beams=options.get("num_beams", 1))
    assert torch.equal(use_flash_attention(model).generate(**inputs, **GREEDY, **options), expected)


@pytest.mark.parametrize("name", ["unpadded", "left", "packed", "lengths"])
def test_a_window_that_hides_tokens_is_refused_and_one_that_does_not_changes_nothing(name):
    inputs = INPUTS[name]()
    longest = max(document.shape[1] for document in documents_of(inputs))
    model = eager_streams("mistral", sliding_window=longest)
    expected = run_alone(model, inputs)
    close(run(model, inputs, use_cache=False), expected)
    model = use_flash_attention(eager_streams("mistral", sliding_window=longest - 1))
    message = f"Flash attention can't show a prefix to tokens behind its sliding window of {longest - 1} tokens, got "
    with pytest.raises(ValueError, match=f"{message}{longest}: load the backbone with .*sdpa"):
        model(**inputs, use_cache=False)


def test_generation_within_a_window_goes_on_behind_it():
    """A sliding cache gives every new token just the keys that it sees."""
    model, inputs = eager_streams("mistral", sliding_window=9), padded("left")
    del inputs["position_ids"]
    expected = model.generate(**inputs, **GREEDY, use_cache=False)
    assert torch.equal(use_flash_attention(model).generate(**inputs, **GREEDY), expected)


@pytest.mark.parametrize("name", ["unpadded", "left"])
@pytest.mark.parametrize("model_type", ["qwen2", "gpt_oss"])
def test_samples_of_a_batch_may_run_different_adapters(model_type, name):
    model, inputs = eager_streams(model_type), INPUTS[name]()
    config = ParScaleConfig(task_type="CAUSAL_LM", num_streams=2, num_prefix_tokens=5, init_std=0.5)
    model.add_adapter("two", config)
    names, expected = ["two", "__base__", "default"][: len(inputs["input_ids"])], []
    for adapter, document in zip(names, documents_of(inputs)):
        if adapter != "__base__":
            model.set_adapter(adapter)
            expected.append(model(input_ids=document).logits[0])
            continue
        with model.disable_adapter():
            expected.append(model(input_ids=document).logits[0])
    close(run(model, inputs, adapter_names=names), torch.cat(expected))


@pytest.mark.parametrize("version", [2, 3])
def test_a_single_stream_and_a_disabled_adapter_are_the_plain_backbone(version):
    inputs = packed_by_lengths()
    expected = use_flash_attention(backbone("gpt_oss"), version)(**inputs).logits
    model = use_flash_attention(eager_streams("gpt_oss"), version)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, expected)
    model.add_adapter("one", ParScaleConfig(task_type="CAUSAL_LM", num_streams=1))
    model.set_adapter("one")
    assert torch.equal(model(**inputs).logits, expected)


def test_flash_attention_gets_streams_as_heads_and_the_batch_as_it_is(monkeypatch):
    shapes, function = [], flash_reference.flash_attn_func

    def record(q, k, v, **options):
        shapes.append([tuple(states.shape) for states in (q, k, v)])
        return function(q, k, v, **options)

    monkeypatch.setattr(flash_reference, "flash_attn_func", record)
    flash_reference.install(monkeypatch)
    run(eager_streams("qwen2"), INPUTS["unpadded"]())
    assert shapes == 2 * [[(2, 9, 3 * 4, 8), (2, 3 + 9, 3 * 2, 8), (2, 3 + 9, 3 * 2, 8)]]


def test_lengths_need_nothing_from_the_device():
    """Reading a value back would stop a GPU's queue in every layer, and end the capture of a CUDA graph."""
    with FakeTensorMode():
        starts = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
        kwargs = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 5, "max_length_k": 5}
        key, prefix = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 6, 4)
        states, _, lengths = put_prefix_before_documents(key, key, prefix, prefix, kwargs)
    assert states.shape == (1, 2, 9 + 3 * 6, 4)
    assert lengths["max_length_k"] == 5 + 6


@pytest.mark.parametrize("lengths", [LENGTHS, (12,)], ids=["three documents", "one document"])
def test_documents_are_looked_for_once_in_a_call_and_not_in_every_layer(monkeypatch, lengths):
    class Reads(TorchDispatchMode):
        """Counts what waits for a device."""

        def __init__(self):
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default)
            return function(*args, **(kwargs or {}))

    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        monkeypatch.setattr(flash_reference, name, lambda q, *states, **options: torch.zeros_like(q))
    flash_reference.install(monkeypatch)
    counts = []
    for num_layers in (1, 4):
        model = use_flash_attention(eager_streams("qwen2", num_hidden_layers=num_layers))
        with torch.no_grad(), Reads() as reads:
            model(**packed(lengths), use_cache=False)
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_documents_without_tokens_and_tokens_behind_the_last_document_are_allowed():
    """Padding of a paged cache's inputs: repeated ends, and keys that nothing refers to."""
    starts = torch.tensor([0, 3, 3, 5, 5], dtype=torch.int32)
    kwargs = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 3, "max_length_k": 3}
    key = torch.arange(7.0).view(1, 1, 7, 1)
    prefix = torch.tensor([-1.0, -2.0]).view(1, 1, 2, 1)
    states, values, lengths = put_prefix_before_documents(key, 10 * key, prefix, 10 * prefix, kwargs)
    assert states.flatten().tolist() == [-1, -2, 0, 1, 2, -1, -2, -1, -2, 3, 4, -1, -2, 5, 6]
    assert torch.equal(values, 10 * states)
    assert lengths["cu_seq_lens_k"].tolist() == [0, 5, 7, 11, 13]
    assert lengths["cu_seq_lens_k"].dtype == torch.int32
    assert lengths["cu_seq_lens_q"] is starts
