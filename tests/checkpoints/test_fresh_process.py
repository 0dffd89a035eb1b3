"""Logits in a wider dtype than that of the weights are those of a copy in that dtype, without the copy."""

import copy

import pytest
import torch
from support.tiny_models import ARCHITECTURES, random_tokens, tiny_model, with_streams
from torch.utils._python_dispatch import TorchDispatchMode

from parscale_adapt.checkpoints import fresh_process
from parscale_adapt.checkpoints.fresh_process import ComputingIn, compute_logits


FALCON_H1 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
LFM2 = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
CASES = {name: {} for name in ARCHITECTURES} | {"falcon_h1": FALCON_H1, "lfm2": LFM2, "mamba": {}}


def padded_batch():
    input_ids = random_tokens(batch_size=2, length=7)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :3] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "compared": attention_mask.bool()}


@pytest.mark.parametrize("model_type", CASES)
def test_a_model_in_half_precision_computes_in_float32(model_type):
    implementation = "eager" if model_type in ("mamba", "gpt_oss") else "sdpa"
    model = tiny_model(model_type, implementation, **CASES[model_type]).bfloat16()
    transform = {"stream_transform": "bitfit", "num_prefix_tokens": 48} if model_type == "mamba" else {}
    model = with_streams(model, 3, **transform)
    before = {name: (parameter, parameter.dtype) for name, parameter in model.named_parameters()}
    found = compute_logits(model, padded_batch(), torch.float32)
    assert found.dtype == torch.float32
    assert all(parameter is before[name][0] for name, parameter in model.named_parameters())
    assert all(parameter.dtype is before[name][1] for name, parameter in model.named_parameters())
    assert torch.equal(found, compute_logits(copy.deepcopy(model).float(), padded_batch()))
    assert not torch.equal(found, compute_logits(model, padded_batch()).float())


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_moe"])
def test_rounding_in_float32_is_seen_in_float64(model_type):
    model = with_streams(tiny_model(model_type), 3)
    found, wider = compute_logits(model, padded_batch()), compute_logits(model, padded_batch(), torch.float64)
    assert wider.dtype == torch.float64
    assert 0 < (found - wider).abs().max() < 1e-5


def test_what_asks_for_a_narrower_type_gets_the_wide_one():
    half = torch.ones(3, dtype=torch.bfloat16)
    with ComputingIn(torch.float32):
        assert half.dtype is torch.float32
        results = [
            half + half,
            half.to(torch.float16),
            torch.zeros(2, dtype=torch.bfloat16),
            half.half(),
            half.bfloat16(),
        ]
        results += [torch.arange(3).float(), torch.nn.functional.linear(half, half[None])]
        assert torch.arange(3).dtype is torch.int64
        assert half.double().dtype is torch.float64
        assert half.shape == (3,)
    assert {result.dtype for result in results} == {torch.float32}
    assert half.dtype is torch.bfloat16


class WidestTensor(TorchDispatchMode):
    """Sees how many values the largest tensor in float32 has that any operation gets."""

    num_values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in args:
            if isinstance(value, torch.Tensor) and value.dtype is torch.float32:
                self.num_values = max(self.num_values, value.numel())
        return func(*args, **(kwargs or {}))


def test_large_matrices_are_widened_a_few_rows_at_a_time(monkeypatch):
    model = with_streams(tiny_model("gpt2").bfloat16(), 3)  # with biases
    whole = compute_logits(model, padded_batch(), torch.float32)
    monkeypatch.setattr(fresh_process, "_MAX_WIDENED", 100)
    linear = torch.nn.Linear(30, 17, dtype=torch.bfloat16)
    inputs = torch.randn(2, 5, 30, dtype=torch.bfloat16)
    with torch.no_grad(), WidestTensor() as seen, ComputingIn(torch.float32):
        output = linear(inputs)
    assert seen.num_values == inputs.numel() < linear.weight.numel()
    torch.testing.assert_close(output, linear.float()(inputs.float()))
    torch.testing.assert_close(compute_logits(model, padded_batch(), torch.float32), whole)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_logits_of_chosen_positions(dtype):
    model, batch = with_streams(tiny_model()), padded_batch()
    batch["compared"][:, :-2] = False
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(compute_logits(model, batch, dtype).float(), logits[:, -2:].flatten(0, 1))
    assert compute_logits(model, {"input_ids": batch["input_ids"]}).shape == (14, 97)
