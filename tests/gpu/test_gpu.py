"""What only a GPU shows: kernels in half precision, compiled graphs, 4-bit weights, memory. Run by `make test-gpu`.

The reference is the same model in float32 on the CPU, which all other tests hold to the published model.
"""

import copy
import importlib.util

import pytest
import torch
from peft import PeftModel
from support.tiny_models import random_tokens, tiny_model, with_streams
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompileConfig

from parscale_adapt.core.aggregator import DynamicAggregator


pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SIZES = {"hidden_size": 128, "intermediate_size": 192}  # heads of 32, which every kernel takes
GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
IMPLEMENTATIONS = [
    "sdpa",
    "flex_attention",
    pytest.param(
        "flash_attention_2",
        marks=pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash_attn is not installed"),
    ),
]


def left_padded() -> dict[str, torch.Tensor]:
    attention_mask = torch.ones(2, 40, dtype=torch.long)
    attention_mask[0, :7] = 0
    return {"input_ids": random_tokens(2, 40), "attention_mask": attention_mask}


def to_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def streams_in_half_precision(implementation: str, **changes) -> tuple[PeftModel, PeftModel]:
    """A model in bfloat16 on the GPU, and the same weights in float32 on the CPU."""
    model = with_streams(tiny_model(**SIZES, **changes).bfloat16(), num_streams=4)
    reference = copy.deepcopy(model).float()
    model.set_attn_implementation(implementation)
    return model.to(DEVICE), reference


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Root of the mean square of the error, relative to that of what is expected."""
    error = (result.detach().cpu().double() - expected.detach().double()).square().mean()
    return (error / expected.detach().double().square().mean()).sqrt().item()


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_logits_are_those_of_float32_on_the_cpu(implementation):
    model, reference = streams_in_half_precision(implementation)
    inputs = left_padded()
    visible = inputs["attention_mask"].bool()
    expected = reference(**inputs).logits[visible]
    assert relative_error(model(**to_gpu(inputs)).logits.cpu()[visible], expected) < 0.03


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_decoding_gives_the_logits_of_one_call(implementation):
    """Prefill, a single token, and a few at once, which take three different ways through attention."""
    model, reference = streams_in_half_precision(implementation)
    inputs = left_padded()
    visible = inputs["attention_mask"].bool()
    expected = reference(**inputs).logits[visible]
    cache, pieces, end = None, [], 0
    for length in (30, 1, 9):
        piece = {
            "input_ids": inputs["input_ids"][:, end : end + length],
            "attention_mask": inputs["attention_mask"][:, : end + length],
        }
        output = model(**to_gpu(piece), past_key_values=cache, use_cache=True)
        cache, end = output.past_key_values, end + length
        pieces.append(output.logits.cpu())
    assert relative_error(torch.cat(pieces, 1)[visible], expected) < 0.03


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_gradients_of_prefixes_are_those_of_float32_on_the_cpu(implementation):
    """Prefixes alone, since an aggregator's gradient is the small difference of what the streams contribute."""
    model, reference = streams_in_half_precision(implementation, num_hidden_layers=1)
    inputs = {"input_ids": random_tokens(2, 64), "labels": random_tokens(2, 64)}
    reference(**inputs).loss.backward()
    model(**to_gpu(inputs)).loss.backward()
    parameters = dict(model.named_parameters())
    prefixes = {name: prefix for name, prefix in reference.named_parameters() if ".parscale_prefix_" in name}
    assert len(prefixes) == 2
    for name, prefix in prefixes.items():
        assert relative_error(parameters[name].grad, prefix.grad) < 0.05, name


def graphs_skipped_while(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Tokens generated in CUDA graphs over a static cache, and how many graphs torch would not record."""
    torch._dynamo.reset()
    counters.clear()
    compile_config = CompileConfig(mode="reduce-overhead", fullgraph=True)
    tokens = model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=compile_config)
    return tokens, counters["inductor"]["cudagraph_skips"]


def test_cuda_graphs_over_a_static_cache_give_the_tokens_of_a_dynamic_cache():
    model = with_streams(tiny_model(**SIZES), num_streams=4).to(DEVICE)
    inputs = to_gpu(left_padded())
    tokens, num_skipped = graphs_skipped_while(model, inputs)
    assert torch.equal(tokens, model.generate(**inputs, **GREEDY))
    with model.disable_adapter():
        assert num_skipped <= graphs_skipped_while(model, inputs)[1]


@pytest.mark.parametrize("train_in", [torch.float32, torch.bfloat16])
def test_a_4_bit_backbone_trains_streams(tmp_path, train_in):
    tiny_model(**SIZES).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=train_in,
    )
    backbone = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, dtype=train_in, device_map={"": 0}
    )
    model = with_streams(backbone, num_streams=2).train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    inputs = to_gpu({"input_ids": random_tokens(2, 32), "labels": random_tokens(2, 32)})
    optimizer, losses = torch.optim.SGD(trained.values(), lr=0.05), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in trained.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_aggregator_makes_no_copy_of_all_streams():
    num_streams, num_tokens, hidden_size = 8, 32768, 512
    aggregator = DynamicAggregator(hidden_size, num_streams, smoothing=0.1)
    aggregator.reset_parameters(0.02)
    aggregator.to(DEVICE)
    states = torch.randn(num_streams, num_tokens, hidden_size, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    bytes_of_all_streams = states.numel() * 4
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mixed = aggregator(states)
    assert torch.cuda.max_memory_allocated() - before < bytes_of_all_streams
    assert torch.cuda.memory_allocated() - before < bytes_of_all_streams / 2
    mixed.sum().backward()
    assert aggregator[0].weight.grad.isfinite().all()
