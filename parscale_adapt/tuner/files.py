"""An adapter's tensors on their way into a file and out of it, under PEFT's protocol."""

import torch
from peft import PeftConfig
from torch import nn

from .registration import PARAMETER_PREFIX
from .state import (
    backbone_shapes,
    check_complete,
    checkpoint_key,
    embedding_shapes,
    expected_adapter_shapes,
    fold_reparameterized,
    refuse_reparameterized,
    saved_module_shapes,
)


def tensors_for_file(
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str,
    selected: dict[str, torch.Tensor],
    state_dict: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """One adapter's tensors, folded, with the trained backbone where there is one; checked to be complete.

    Args:
        model: holds the adapter.
        config, adapter_name: the adapter.
        selected: its tensors as PEFT finds them, by their names in the model.
        state_dict: all tensors of the model.

    Raises:
        ValueError: tensors are missing, or are shards.
    """
    selected = fold_reparameterized(model, selected, adapter_name)
    expected = expected_adapter_shapes(model, adapter_name)
    if config.train_backbone:
        shapes = backbone_shapes(model)
        selected |= {name: state_dict[name] for name in shapes if name in state_dict}
        expected |= shapes
    check_complete(selected, expected, f"The state of adapter {adapter_name!r}")
    return selected


def tensors_from_file(
    model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of a file by their names in the model: those of the adapter, and those of a trained backbone.

    Raises:
        ValueError: a tensor is missing, unexpected, or has another shape, or can't be put where it belongs.
    """
    refuse_reparameterized(model, adapter_name)
    expected = expected_adapter_shapes(model, adapter_name) | saved_module_shapes(model, adapter_name)
    backbone = backbone_shapes(model) if config.train_backbone else {}
    embeddings = embedding_shapes(model)
    expected |= {name: embeddings[name] for name in state_dict.keys() & embeddings.keys() - backbone.keys()}
    model_keys = {checkpoint_key(key, adapter_name): key for key in (*expected, *backbone)}
    tensors = {model_keys.get(key, key): tensor for key, tensor in state_dict.items()}
    check_complete(tensors, expected | backbone, "The adapter file")
    _refuse_offloaded_embeddings(model, tensors.keys() & embeddings.keys())
    return {name: tensors[name] for name in tensors if name not in backbone}, {
        name: tensors[name] for name in backbone
    }


def _refuse_offloaded_embeddings(model: nn.Module, names: set[str]) -> None:
    parameters = dict(model.named_parameters())
    for name in sorted(names):
        if name in parameters and parameters[name].is_meta:
            raise ValueError(
                f"The adapter file brings `{name}`, which accelerate offloads: load the backbone without offloading."
            )


def stream_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's streams by their names in a file, folded, without shared LoRA."""
    state = fold_reparameterized(model, model.state_dict(), adapter_name)
    keys = {key: checkpoint_key(key, adapter_name) for key in expected_adapter_shapes(model, adapter_name)}
    return {name: state[key] for key, name in keys.items() if f".{PARAMETER_PREFIX}" in name}
