import functools
import itertools
import math
from types import FunctionType, SimpleNamespace

import pytest
import torch
from support.tiny_models import random_tokens, tiny_model, with_streams
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from parscale_adapt.core.layout import UniformLayout
from parscale_adapt.core.prefix import StreamPrefix
from parscale_adapt.hf.config_view import STREAMS
from parscale_adapt.hf.decoder import restore_stock_functions, route_through_streams
from parscale_adapt.hf.observer import AttentionObserver, observe_attention
from parscale_adapt.hf.prefixed_attention import SUPPORTED_IMPLEMENTATIONS, is_common_eager
from parscale_adapt.hf.stream_call import StreamCall


P, B, HEADS, GROUPS, SIZE, VALUE_SIZE, N = 2, 3, 2, 2, 8, 6, 4


class Streams(torch.nn.Module):
    """What the attention function asks of a layer: prefixes of two kinds, values of another size than keys."""

    def __init__(self):
        super().__init__()
        self.keys, self.values = StreamPrefix((P, HEADS, N, SIZE)), StreamPrefix((P, HEADS, N, VALUE_SIZE))
        self.keys.reset_parameters(1.0)
        self.values.reset_parameters(1.0)

    def forward(self, adapter, dtype, chunk):
        assert adapter == "chosen"
        return self.keys(dtype, chunk), self.values(dtype, chunk)


def attention_module(num_streams=P, implementation="sdpa"):
    model = tiny_model("llama", implementation)
    module = modeling_llama.LlamaAttention(model.config, layer_idx=0)
    module.num_key_value_groups = GROUPS
    module.parscale = Streams()
    model.model.parscale = SimpleNamespace(running=StreamCall(UniformLayout(num_streams), "chosen", N))
    route_through_streams(module, model.model)
    return module


def random_states(length, past=0):
    query = torch.randn(P * B, HEADS * GROUPS, length, SIZE)
    key = torch.randn(P * B, HEADS, past + length, SIZE)
    return query, key, torch.randn(P * B, HEADS, past + length, VALUE_SIZE)


def attend(implementation, module, query, key, value, mask=None, **kwargs):
    function = ALL_ATTENTION_FUNCTIONS[f"{STREAMS}{implementation}"]
    return function(module, query, key, value, mask, scaling=SIZE**-0.5, dropout=0.0, **kwargs)[0]


def attend_by_hand(streams, query, key, value, visible):
    """One query at a time; `visible[row, query, key]` speaks of the layer's own keys."""
    output = torch.empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    for row, head, token in itertools.product(*map(range, query.shape[:3])):
        stream, key_head = row // B, head // GROUPS
        seen = visible[row, token].nonzero().flatten()
        keys = torch.cat([streams.keys.weight[stream, key_head], key[row, key_head, seen]])
        values = torch.cat([streams.values.weight[stream, key_head], value[row, key_head, seen]])
        weights = torch.softmax(keys @ query[row, head, token] / math.sqrt(SIZE), 0)
        output[row, token, head] = weights @ values
    return output


def causal(length, past=0):
    return torch.ones(P * B, length, past + length, dtype=torch.bool).tril(past)


@pytest.mark.parametrize("folded", [False, True], ids=["rows", "folded"])
@pytest.mark.parametrize("length", [1, 5])
def test_without_a_mask_sdpa_lets_token_t_see_the_prefix_and_tokens_up_to_t(length, folded):
    module, (query, key, value) = attention_module(), random_states(length)
    expected = attend_by_hand(module.parscale, query, key, value, causal(length))
    if folded:
        key, value = UniformLayout(P).to_heads(key), UniformLayout(P).to_heads(value)
    torch.testing.assert_close(attend("sdpa", module, query, key, value), expected)


def test_without_a_mask_one_new_token_sees_the_prefix_and_everything_cached():
    module, (query, key, value) = attention_module(), random_states(1, past=5)
    expected = attend_by_hand(module.parscale, query, key, value, causal(1, past=5))
    torch.testing.assert_close(attend("sdpa", module, query, key, value), expected)


@pytest.mark.parametrize("rows_of_mask", [1, P * B])
@pytest.mark.parametrize(("implementation", "kind"), [("sdpa", "bool"), ("sdpa", "float"), ("eager", "float")])
def test_a_mask_hides_tokens_but_never_the_prefix(implementation, kind, rows_of_mask):
    module, (query, key, value) = attention_module(), random_states(5, past=2)
    visible = causal(5, past=2)
    visible[:, :, 0] = False  # padding
    visible[:, 4, :4] = False  # a window
    visible[:, 1] = False  # a token that sees nothing but the prefix
    mask = visible[:rows_of_mask, None]
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = attend_by_hand(module.parscale, query, key, value, visible)
    torch.testing.assert_close(attend(implementation, module, query, key, value, mask), expected)


@pytest.mark.parametrize("length", [5, 20])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_mask_of_the_callers_own_may_differ_by_head(implementation, length):
    """As of one stream after the other, which get the mask as it is."""
    model = with_streams(tiny_model(implementation=implementation), 3)
    mask = torch.randn(2, 4, length, length).masked_fill(~causal(length)[0], torch.finfo(torch.float32).min)
    inputs = {"input_ids": random_tokens(2, length), "attention_mask": mask, "use_cache": False}
    found = model(**inputs).logits
    model.set_stream_chunk_size(1)
    torch.testing.assert_close(found, model(**inputs).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_single_stream_gets_the_stock_function(implementation):
    module, (query, key, value) = attention_module(num_streams=1), random_states(5)
    mask = torch.zeros(1, 1, 5, 5)
    stock = {"eager": modeling_llama.eager_attention_forward, "sdpa": ALL_ATTENTION_FUNCTIONS["sdpa"]}[implementation]
    expected = stock(module, query, key, value, mask, scaling=SIZE**-0.5, dropout=0.0)[0]
    assert torch.equal(attend(implementation, module, query, key, value, mask), expected)


@pytest.mark.parametrize("implementation", SUPPORTED_IMPLEMENTATIONS)
def test_routing_leaves_the_name_on_the_model_and_is_undone_exactly(implementation):
    model = tiny_model()
    decoder, module, config = model.model, model.model.layers[0].self_attn, model.config
    model.config._attn_implementation_internal = implementation
    route_through_streams(module, decoder)
    route_through_streams(module, decoder)
    assert module.config._attn_implementation == f"{STREAMS}{implementation}"
    assert model.config is config
    assert config._attn_implementation == implementation
    restore_stock_functions(module)
    assert module.config is config


def test_another_implementation_chosen_later_reaches_routed_modules():
    model = tiny_model()
    module = model.model.layers[0].self_attn
    route_through_streams(module, model.model)
    model.set_attn_implementation("eager")
    assert module.config._attn_implementation == f"{STREAMS}eager"


def test_an_implementation_that_knows_no_streams_is_refused_by_name():
    model = with_streams(tiny_model())
    model.config._attn_implementation_internal = "flash_attention_9"
    with pytest.raises(ValueError, match=r"must be one of eager, sdpa, .* for streams, got 'flash_attention_9'"):
        model(random_tokens())


@pytest.mark.parametrize("name", ["indices", "block_indices"])
def test_attention_that_addresses_single_keys_is_refused(name):
    function = ALL_ATTENTION_FUNCTIONS[f"{STREAMS}sdpa"]
    with pytest.raises(ValueError, match=f"LlamaAttention picks single keys .`{name}`."):
        function(attention_module(), *random_states(5), None, **{name: torch.zeros(1)})


@pytest.mark.parametrize("folded", [False, True], ids=["rows", "folded"])
@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("rows_of_bias", [1, P * B])
def test_a_position_bias_weighs_tokens_and_leaves_the_prefix_alone(rows_of_bias, has_mask, folded):
    module, (query, key, value) = attention_module(), random_states(5)
    bias = torch.randn(rows_of_bias, HEADS * GROUPS, 5, 5)
    mask = causal(5)[:1, None] if has_mask else None
    prefix_key, prefix_value = (
        prefix.weight.repeat_interleave(B, 0) for prefix in (module.parscale.keys, module.parscale.values)
    )
    keys, values = torch.cat([prefix_key, key], 2), torch.cat([prefix_value, value], 2)
    scores = query @ keys.repeat_interleave(GROUPS, 1).transpose(2, 3) / math.sqrt(SIZE)
    scores[..., N:] += bias.masked_fill(~causal(5)[:1, None], -math.inf)
    expected = (scores.softmax(-1) @ values.repeat_interleave(GROUPS, 1)).transpose(1, 2)
    if folded:
        key, value = UniformLayout(P).to_heads(key), UniformLayout(P).to_heads(value)
    torch.testing.assert_close(attend("sdpa", module, query, key, value, mask, position_bias=bias), expected)


def test_an_eager_attention_of_unknown_origin_is_refused():
    module = torch.nn.Linear(2, 2)
    module.config = attention_module(num_streams=1).config
    with pytest.raises(ValueError, match=r'Linear has no eager attention function .* `attn_implementation="sdpa"`'):
        attend("eager", module, *random_states(5))


def test_observers_see_keys_before_the_prefix_and_only_inside_their_block():
    model = with_streams(tiny_model())
    layers = model.get_base_model().model.layers
    expected, seen, made = model(random_tokens()).logits, [], []

    class Observer(AttentionObserver):
        def see_mask(self, mask):
            made.append(mask)

        def see_attention(self, call, implementation):
            assert implementation == "sdpa"
            seen.append(call)

    padded = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    with model.disable_adapter(), observe_attention(model.get_base_model(), Observer()):
        model(random_tokens(), attention_mask=padded)
    assert [call.module for call in seen] == [layer.self_attn for layer in layers]
    assert all(call.query.shape == (2, 4, 9, 8) for call in seen)
    assert all(states.shape == (2, 2, 9, 8) for call in seen for states in (call.key, call.value))
    assert len(made) == 1
    assert all(call.mask is made[0] for call in seen)
    assert torch.equal(model(random_tokens()).logits, expected)
    assert len(seen) == 2


class Copies(TorchDispatchMode):
    """Names the operations that copy tensors of at least so many elements, in their order."""

    def __init__(self, minimum=0):
        super().__init__()
        self.minimum, self.names = minimum, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, output = function.overloadpacket.__name__, function(*args, **(kwargs or {}))
        if name in ("cat", "clone", "constant_pad_nd", "copy_", "_to_copy") and output.numel() >= self.minimum:
            self.names.append(name)
        return output


def test_streams_go_among_heads_in_the_copy_that_takes_in_the_prefix(monkeypatch):
    def stock(module, query, key, value, mask, **options):
        assert (query.shape[1], key.shape[1], value.shape[1]) == (P * HEADS * GROUPS, P * HEADS, P * HEADS)
        seen.extend(copies.names)
        return torch.zeros(B, query.shape[2], query.shape[1], VALUE_SIZE), None

    seen, module, states = [], attention_module(), random_states(5)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", stock)
    with Copies() as copies:
        attend("sdpa", module, *states)
    assert seen == ["_to_copy", "_to_copy", "cat", "cat", "constant_pad_nd"]  # of two prefixes, keys, values, queries
    assert copies.names[len(seen) :] == ["clone"]  # the output by row


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_new_token_copies_no_cached_key(implementation):
    """Keys and values of a cache come with streams as heads."""
    module, (query, key, value) = attention_module(), random_states(1, past=5)
    heads = UniformLayout(P).to_heads
    key, value, mask = heads(key), heads(value), torch.zeros(1, 1, 1, 6)
    expected = attend_by_hand(module.parscale, query, *map(UniformLayout(P).to_rows, (key, value)), causal(1, past=5))
    with Copies(minimum=value.numel()) as copies:
        output = attend(implementation, module, query, key, value, mask)
    torch.testing.assert_close(output, expected)
    assert copies.names == []


def test_eager_weights_are_those_of_rows_prefix_first():
    """Joined or not, as the architecture's own function has them."""
    function, module = ALL_ATTENTION_FUNCTIONS[f"{STREAMS}eager"], attention_module(implementation="eager")
    for past, length in ((6, 1), (0, 20)):
        query, key, value = random_states(length, past)
        mask = torch.zeros(1, 1, length, past + length).masked_fill(~causal(length, past)[:1, None], -math.inf)
        prefix = module.parscale.keys.weight.repeat_interleave(B, 0)
        scores = query @ torch.cat([prefix, key], 2).repeat_interleave(GROUPS, 1).mT / math.sqrt(SIZE)
        scores[..., N:] += mask
        _, weights = function(module, query, key, value, mask, scaling=SIZE**-0.5)
        torch.testing.assert_close(weights, scores.softmax(-1))


def test_an_eager_function_that_is_not_the_common_one_gets_rows(monkeypatch):
    def stock(module, query, key, value, mask, **options):
        seen.append((query.shape[0], key.shape[0]))
        return torch.zeros(len(query), query.shape[2], query.shape[1], VALUE_SIZE), None

    seen, module = [], attention_module(implementation="eager")
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", stock)
    attend("eager", module, *random_states(1, past=3), torch.zeros(1, 1, 1, 4))
    assert seen == [(P * B, P * B)]


def test_the_common_eager_function_is_told_by_its_instructions_and_those_of_what_it_calls():
    common = modeling_llama.eager_attention_forward
    assert is_common_eager(common)
    assert is_common_eager(modeling_qwen3.eager_attention_forward)
    assert not is_common_eager(modeling_gemma2.eager_attention_forward)
    other = {**vars(modeling_llama), "repeat_kv": lambda states, groups: states.repeat(1, groups, 1, 1)}
    assert not is_common_eager(FunctionType(common.__code__, other))
    assert not is_common_eager(functools.partial(common))


@pytest.mark.parametrize("length", [1, 5])
def test_a_soft_cap_that_sdpa_refuses_is_refused_in_decoding_too(length):
    module, (query, key, value) = attention_module(), random_states(length)
    with pytest.raises(ValueError, match="softcap"):
        attend("sdpa", module, query, key, value, softcap=30.0)
