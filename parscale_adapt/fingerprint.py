"""A short fingerprint of a backbone, stored with the adapter, so that an adapter is not put on other weights.

It covers the backbone's shape and a sample of a few tensors that quantization leaves alone, rounded to bfloat16, so
that the same checkpoint gives the same fingerprint in float32, bfloat16 and float16, quantized or not.
"""

import hashlib
import json
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from .probe import is_partitioned


NUM_SAMPLED_VALUES = 4096
_SMALLEST_SAMPLED = 2.0**-13  # float16 keeps fewer digits of what is smaller
_SHAPE_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def backbone_fingerprint(model: PreTrainedModel) -> dict[str, str]:
    """`{"shape": ..., tensor name: sha256 of sampled values, ...}` of a causal LM without adapters."""
    config = model.config.get_text_config().to_dict()
    shape = {name: config.get(name) for name in _SHAPE_FIELDS}
    fingerprint = {"shape": json.dumps(shape, sort_keys=True)}
    for name, parameter in _sampled_parameters(model):
        fingerprint[name] = _hash_sample(parameter)
    return fingerprint


def describe_difference(expected: dict[str, str], found: dict[str, str]) -> str | None:
    """One phrase that says how two fingerprints differ, or None where they agree."""
    if expected["shape"] != found["shape"]:
        return f"its shape is {found['shape']} instead of {expected['shape']}"
    changed = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    if changed:
        return f"its weights differ (first in `{changed[0]}`)"
    return None


def _sampled_parameters(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The embedding and all norms-like vectors of the first, middle and last module that own one."""
    embedding = model.get_input_embeddings().weight
    names = {parameter: name for name, parameter in model.named_parameters()}
    yield names[embedding], embedding
    vectors = [(name, parameter) for name, parameter in model.named_parameters() if len(_full_shape(parameter)) == 1]
    for index in sorted({0, len(vectors) // 2, len(vectors) - 1}) if vectors else ():
        yield vectors[index]


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


def _hash_sample(parameter: nn.Parameter) -> str:
    if parameter.is_meta:
        return "meta"
    values = _sample(parameter).float()
    values[values.abs() < _SMALLEST_SAMPLED] = 0.0
    return hashlib.sha256(values.bfloat16().view(torch.int16).numpy().tobytes()).hexdigest()[:16]


@torch.no_grad()
def _sample(parameter: nn.Parameter) -> torch.Tensor:
    """Up to `NUM_SAMPLED_VALUES` evenly spaced values of a tensor, on the CPU."""
    if is_partitioned(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return _evenly_spaced(parameter)
    return _evenly_spaced(parameter)


def _evenly_spaced(parameter: nn.Parameter) -> torch.Tensor:
    flat = parameter.detach().flatten()
    step = max(1, flat.numel() // NUM_SAMPLED_VALUES)
    return flat[::step][:NUM_SAMPLED_VALUES].cpu().clone()
