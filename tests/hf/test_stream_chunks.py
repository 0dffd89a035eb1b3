"""Streams that run a few at a time: the same gradients as all at once, the activations of one chunk.

In float64 both ways differ by rounding alone, and whatever else differs shows.
"""

import pytest
import torch
from peft import LoraConfig
from support.quantized import load_in_4bit
from support.tiny_models import random_tokens, tiny_model, with_streams
from support.trainers import trainer_of
from torch.nn.parallel import DistributedDataParallel

from parscale_adapt import final_stream_states, stream_decorrelation
from parscale_adapt.hf import stream_chunks


def padded():
    ids, mask = random_tokens(), torch.ones(2, 9, dtype=torch.long)
    ids[0, :4] = mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed():
    ids = random_tokens(1, 9)
    return {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])}


def whole():
    return {"input_ids": random_tokens(), "labels": random_tokens(seed=3)}


def results(model, inputs=None, run=None, seed=0):
    """Loss, auxiliary loss and gradients of one step of training."""
    torch.manual_seed(seed)
    model.train()
    model.zero_grad()
    output = (model if run is None else run)(**{**whole(), "use_cache": False, **(inputs or {})})
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "aux": getattr(output, "aux_loss", None), **found}


def assert_same(found, expected, tolerance):
    """All tensors, each within `tolerance` of the largest of its own elements; tiny ones within that of all."""
    assert found.keys() == expected.keys()
    largest = max(tensor.abs().max() for tensor in expected.values() if tensor is not None)
    for name, tensor in expected.items():
        if tensor is not None:
            scale = max(tensor.abs().max(), 1e-3 * largest)
            difference = (found[name] - tensor).abs().max() / scale
            assert difference <= tolerance, f"{name}: {difference:.1e}"


def chunked(model, size, **arguments):
    model.set_stream_chunk_size(size)
    return results(model, **arguments)


MANY = ["prefix", "lora", "bitfit"]
KINDS = {
    "frozen": {},
    "full": {"train_backbone": True},
    "shared LoRA": {"lora": LoraConfig(r=2, target_modules=["q_proj", "down_proj"])},
    "per-stream LoRA": {"stream_transform": "lora", "num_prefix_tokens": 48},
    "all transforms": {"stream_transform": MANY},
    "reparameterized": {"init_weights": "reparameterized"},
    "static aggregator": {"aggregator": "static"},
}
SIZES = [(4, 1), (4, 2), (3, 2)]  # the last with a chunk that is smaller


@pytest.mark.parametrize(("num_streams", "size"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_all_streams_at_once(kind, num_streams, size):
    model = with_streams(tiny_model(), num_streams, **KINDS[kind]).double()
    assert_same(chunked(model, size), results_at_once(model), 1e-12)


def results_at_once(model, **arguments):
    model.set_stream_chunk_size(None)
    return results(model, **arguments)


@pytest.mark.parametrize("inputs", [padded, packed])
@pytest.mark.parametrize("model_type", ["qwen2", "mistral", "gemma3_text", "deepseek_v3", "phi3"])
def test_it_holds_for_every_kind_of_batch_and_attention(model_type, inputs):
    model = with_streams(tiny_model(model_type), 3, train_backbone=True).double()
    tolerance = 1e-5 if model_type == "gemma3_text" else 1e-12  # whose norms are in float32
    for size in (1, 2):
        assert_same(chunked(model, size, inputs=inputs()), results_at_once(model, inputs=inputs()), tolerance)


def test_it_holds_under_eager_attention():
    model = with_streams(tiny_model(implementation="eager"), 3)
    assert_same(chunked(model, 1, inputs=padded()), results_at_once(model, inputs=padded()), 2e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["frozen", "full", "all transforms"])
def test_it_holds_where_every_layer_is_checkpointed(kind, use_reentrant):
    model = with_streams(tiny_model(), 4, **KINDS[kind]).double()
    expected = results_at_once(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    functions = [layer._gradient_checkpointing_func for layer in model.get_base_model().model.layers]
    for size in (1, 3):
        assert_same(chunked(model, size), expected, 1e-12)
    assert functions == [layer._gradient_checkpointing_func for layer in model.get_base_model().model.layers]


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_experts_are_balanced_over_the_tokens_of_all_streams(model_type, checkpoints):
    implementation = "eager" if model_type == "gpt_oss" else "sdpa"
    model = with_streams(tiny_model(model_type, implementation), 3, train_backbone=True)
    model.get_base_model().set_experts_implementation("eager")  # others don't know float64
    model.double()
    inputs = {**padded(), "output_router_logits": True}
    expected = results_at_once(model, inputs=inputs)
    assert expected["aux"] > 0
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for size in (1, 2):
        assert_same(chunked(model, size, inputs=inputs), expected, 1e-12)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_dropout_draws_the_same_when_a_chunk_is_replayed(checkpoints, monkeypatch):
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.3)
    model = with_streams(tiny_model(attention_dropout=0.3), 3, lora=lora).double()
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.set_stream_chunk_size(1)
    replayed = results(model)
    state = torch.get_rng_state()
    monkeypatch.setattr(stream_chunks, "checkpoint", lambda run, *args, **kwargs: run(*args))
    assert_same(replayed, results(model), 1e-12)
    assert torch.equal(state, torch.get_rng_state()), "a replay moved the random numbers of the run"
    assert results(model, seed=1)["loss"] != replayed["loss"]


def test_float32_agrees_to_rounding_in_20_steps():
    losses = []
    for size in (None, 1):
        model = with_streams(tiny_model(), 4, stream_chunk_size=size, train_backbone=True).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(20):
            loss = model(**whole(), use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[20:] == pytest.approx(losses[:20], rel=1e-5)
    assert losses[19] < losses[0]


def as_one(found):
    return torch.cat([tensor.flatten().float() for name, tensor in found.items() if name not in ("loss", "aux")])


def test_float32_gradients_agree_within_a_millionth():
    model = with_streams(tiny_model(), 4, train_backbone=True)
    expected = as_one(results_at_once(model))
    for size in (1, 2, 3):
        assert (as_one(chunked(model, size)) - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
def test_half_precision_replays_in_half_precision(kind):
    model = with_streams(tiny_model(), 3, train_backbone=kind == "autocast", init_std=0.1)
    if kind == "bfloat16":
        model.to(torch.bfloat16)
    found = []
    for size in (None, 1):
        model.set_stream_chunk_size(size)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            loss = model.train()(**whole(), use_cache=False).loss
        loss.backward()
        found.append(as_one({name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert (found[1] - found[0]).norm() < 0.02 * found[0].norm()


def test_a_4bit_backbone_has_the_same_gradients(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path)
    model = with_streams(load_in_4bit(tmp_path), 3)
    expected = as_one(results_at_once(model))
    assert (as_one(chunked(model, 1)) - expected).norm() <= 1e-5 * expected.norm()


def test_a_loss_that_compares_the_streams_has_the_same_gradients():
    model = with_streams(tiny_model(), 3, train_backbone=True).double().train()
    found = []
    for size in (None, 1):
        model.set_stream_chunk_size(size)
        model.zero_grad()
        with final_stream_states(model) as states:
            loss = model(**whole(), use_cache=False).loss + stream_decorrelation(states[-1])
        loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert_same(found[1], found[0], 1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_and_compiled_layers_have_the_gradients_of_the_model(backend):
    model = with_streams(tiny_model(), 3, train_backbone=True).double()
    expected = results_at_once(model)
    model.set_stream_chunk_size(1)
    assert_same(results(model, run=torch.compile(model, backend=backend)), expected, 1e-12)
    for layer in model.get_base_model().model.layers:
        layer.compile(backend=backend)
    assert_same(results(model), expected, 1e-12)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_data_parallel_training_sees_each_gradient_once(one_process, use_reentrant):
    model = with_streams(tiny_model(), 3, train_backbone=True).double()
    expected = results_at_once(model)
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.set_stream_chunk_size(1)
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        assert_same(results(model, run=parallel), expected, 1e-12)


def test_the_fused_loss_of_trl_and_a_trainer_give_the_same(tmp_path):
    found = []
    for size in (None, 1):
        model = with_streams(tiny_model(), 3, stream_chunk_size=size)
        trainer = trainer_of(model, tmp_path, max_steps=2, loss_type="chunked_nll", gradient_checkpointing=True)
        rows = seen_rows(model)
        trainer.train()
        assert set(rows) == ({8} if size else {24})
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append({"loss": torch.tensor(losses), **dict(model.named_parameters())})
    assert_same({k: v.detach() for k, v in found[1].items()}, {k: v.detach() for k, v in found[0].items()}, 1e-5)


def seen_rows(model):
    """Numbers of rows that the first layer runs on, one for each time."""
    rows = []
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    return rows


def test_every_chunk_but_the_last_runs_once_more():
    model = with_streams(tiny_model(), 5)
    rows = seen_rows(model)
    chunked(model, 2)
    assert rows == [4, 4, 2, 4, 4]
    rows.clear()
    with torch.no_grad():
        model(**whole(), use_cache=False)
    assert rows == [4, 4, 2]


def test_the_activations_of_all_but_one_chunk_are_released():
    kept = {}
    for num_streams in (2, 8):
        for size in (None, 1):
            model = with_streams(tiny_model(), num_streams, aggregator="static", stream_chunk_size=size).train()
            total = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, total=total: total.append(t) or t, lambda t: t):
                decoder = model.get_base_model().model
                output = decoder(input_ids=random_tokens(2, 64), use_cache=False).last_hidden_state
            assert output.requires_grad
            kept[num_streams, size] = sum({t.untyped_storage()._cdata: t.nbytes for t in total}.values())
    one = kept[2, 1]
    states = 6 * 2 * 64 * 32 * 4
    assert kept[8, None] > 3 * kept[2, None]
    assert kept[8, 1] <= one + 3 * states


def test_hidden_states_and_attentions_are_those_of_all_streams():
    model = with_streams(tiny_model(implementation="eager"), 3)
    options = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    with torch.no_grad():
        expected = model(**whole(), **options)
        model.set_stream_chunk_size(2)
        found = model(**whole(), **options)
        as_tuple = model(**whole(), **options, return_dict=False)
    for name in ("hidden_states", "attentions"):
        for one, other in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(as_tuple[1], expected.logits)


def test_a_cache_is_refused_in_training():
    model = with_streams(tiny_model(), 3, stream_chunk_size=1).train()
    with pytest.raises(ValueError, match="a cache would be filled twice"):
        model(**whole(), use_cache=True)
    cache = model.eval()(**whole()).past_key_values
    with pytest.raises(ValueError, match="set `stream_chunk_size`, now 1, to None"):
        model.train()(**whole(), past_key_values=cache)
    assert model(**whole()).past_key_values is None


def test_what_chunks_cannot_join_is_refused():
    with pytest.raises(ValueError, match="returns a set, which chunks of streams can't join"):
        stream_chunks._joined([set(), set()])
