"""A short fingerprint of a backbone, stored with the adapter, so that an adapter is not put on other weights.

It covers the backbone's shape and a sample of a few tensors that quantization leaves alone, rounded to bfloat16 with
and without a step through float16, so that a checkpoint loaded in float32, bfloat16 or float16, quantized or not,
agrees with itself. (A float32 checkpoint in bfloat16 and in float16 are too far apart to agree with each other.)
"""

import hashlib
import json
from collections.abc import Collection, Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .engines import gathered, is_partitioned, stored_value


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
    """`{"shape": ..., tensor name: hashes of sampled values, ...}` of a causal LM without adapters."""
    fingerprint = {"shape": shape_entry(model.config)}
    for name, parameter in _sampled_parameters(model):
        with gathered([parameter]):
            entry = tensor_entry(stored_value(model, name))
        if entry is not None:
            fingerprint[name] = entry
    return fingerprint


def shape_entry(config: PreTrainedConfig) -> str:
    """What a fingerprint says of the shape of a backbone with this configuration."""
    config = config.get_text_config()
    return json.dumps({name: getattr(config, name, None) for name in _SHAPE_FIELDS}, sort_keys=True)


@torch.no_grad()
def tensor_entry(tensor: torch.Tensor) -> str | None:
    """What a fingerprint says of a tensor: hashes of up to `NUM_SAMPLED_VALUES` evenly spaced values; None on the meta
    device, of a model that is only a shape."""
    flat = tensor.detach().flatten()
    values = flat[:: max(1, flat.numel() // NUM_SAMPLED_VALUES)][:NUM_SAMPLED_VALUES]
    if values.is_meta:
        return None
    values = values.cpu().clone()
    return f"{_hash(values)} {_hash(values.half())}"


def embedding_name(model: PreTrainedModel) -> str:
    """The name of the embedding's weights, under which a fingerprint knows them."""
    embedding = model.get_input_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is embedding)


def describe_difference(expected: dict[str, str], found: dict[str, str], ignored: Collection[str] = ()) -> str | None:
    """One phrase that says how two fingerprints differ, or None where they agree.

    Args:
        expected, found: two fingerprints.
        ignored: names of entries that need not agree.
    """
    if expected["shape"] != found["shape"] and "shape" not in ignored:
        return f"its shape is {found['shape']} instead of {expected['shape']}"
    compared = (expected.keys() & found.keys()) - {"shape", *ignored}
    changed = sorted(name for name in compared if not _agree(expected[name], found[name]))
    if changed:
        return f"its weights differ (first in `{changed[0]}`)"
    return None


def _sampled_parameters(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The embedding and all norms-like vectors of the first, middle and last module that own one."""
    yield embedding_name(model), model.get_input_embeddings().weight
    vectors = [(name, parameter) for name, parameter in model.named_parameters() if len(_full_shape(parameter)) == 1]
    for index in sorted({0, len(vectors) // 2, len(vectors) - 1}) if vectors else ():
        yield vectors[index]


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


def _agree(hashes: str, other: str) -> bool:
    return not set(hashes.split()).isdisjoint(other.split())


def _hash(values: torch.Tensor) -> str:
    rounded = values.bfloat16()
    rounded[rounded.abs() < _SMALLEST_SAMPLED] = 0.0
    return hashlib.sha256(rounded.view(torch.int16).numpy().tobytes()).hexdigest()[:16]
