"""Adapter files: which tensors belong into one, under which names, and strict checks on the way out and in.

A file holds `<attention>.parscale_prefix_k`, `<attention>.parscale_prefix_v`, `<decoder>.parscale_aggregator.*` and,
where the backbone was trained, every parameter of the backbone.
"""

from collections.abc import Iterable

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from .attention import STREAMS_ATTRIBUTE
from .layers import AttentionStreams, ParScaleLayer
from .prefix import ReparameterizedPrefix
from .probe import gathered, is_partitioned
from .registration import PARAMETER_PREFIX


_LAYER_MARK = f".{STREAMS_ATTRIBUTE}.{PARAMETER_PREFIX}"


def checkpoint_key(key: str, adapter_name: str) -> str:
    """The name in a file of a tensor in the model, for example
    `layers.0.self_attn.parscale.parscale_prefix_k.default.weight` to `layers.0.self_attn.parscale_prefix_k`."""
    host, mark, rest = key.partition(_LAYER_MARK)
    container, _, parameter = rest.partition(f".{adapter_name}.")
    if not mark or not parameter:
        return key
    name = f"{host}.{PARAMETER_PREFIX}{container}"
    return name if container.startswith("prefix") else f"{name}.{parameter}"


def refuse_reparameterized(model: nn.Module, adapter_name: str) -> None:
    """Files hold folded prefixes, which don't fit into the MLPs of an adapter that is in training.

    Raises:
        ValueError: the prefixes of the adapter are reparameterised.
    """
    for name, module in model.named_modules():
        if isinstance(module, ReparameterizedPrefix) and name.endswith(f".{adapter_name}"):
            raise ValueError(
                f"Adapter {adapter_name!r} computes its prefixes by an MLP (`init_weights='reparameterized'`), the file "
                "holds them folded: load the file into a new adapter, which goes on with plain prefixes."
            )


def fold_reparameterized(
    model: nn.Module, tensors: dict[str, torch.Tensor], adapter_name: str
) -> dict[str, torch.Tensor]:
    """Replace the tensors of each reparameterised prefix by the plain prefix that they compute."""
    folded = dict(tensors)
    for name, module in model.named_modules():
        if not isinstance(module, ReparameterizedPrefix) or not name.endswith(f".{adapter_name}"):
            continue
        parameters = {key: folded.pop(f"{name}.{key}") for key, _ in module.named_parameters()}
        folded[f"{name}.weight"] = fold_prefix(module, parameters)
    return folded


@torch.no_grad()
def fold_prefix(module: ReparameterizedPrefix, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """The plain prefix that a reparameterised one computes with these values of its parameters."""
    with torch.device("meta"):
        copy = ReparameterizedPrefix(module.shape)  # without the hooks that engines put on the module itself
    copy.load_state_dict(parameters, assign=True)
    return copy.folded().contiguous()


def expected_adapter_shapes(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """Names in the model and shapes of all tensors of one adapter once folded."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, ParScaleLayer) or adapter_name not in layer.streams_of:
            continue
        if isinstance(layer, AttentionStreams):
            for container in layer.adapter_layer_names:
                shapes[f"{name}.{container}.{adapter_name}.weight"] = layer.prefix_shape(container, adapter_name)
        else:
            aggregator = layer.parscale_aggregator[adapter_name]
            prefix = f"{name}.parscale_aggregator.{adapter_name}"
            shapes |= {f"{prefix}.{key}": full_shape(value) for key, value in aggregator.named_parameters()}
    return shapes


def saved_module_shapes(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """Names in the model and shapes of what one adapter trains in the modules named by `modules_to_save`."""
    return {
        f"{name}.modules_to_save.{adapter_name}.{key}": tuple(tensor.shape)
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        for key, tensor in module.modules_to_save[adapter_name].state_dict().items()
    }


@torch.no_grad()
def load_backbone(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy tensors into the backbone's own parameters, so that tied ones stay tied and no dtype changes."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        with gathered([parameters[name]], writer=0):
            parameters[name].copy_(tensor)


def backbone_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters outside adapters; a tied parameter stands once."""
    adapter_owned = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ParScaleLayer))
    return {
        name: full_shape(parameter)
        for name, parameter in model.named_parameters()
        if not name.startswith(adapter_owned or ("\0",))
    }


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter before any sharding."""
    return tuple(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)


def check_complete(tensors: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]], where: str) -> None:
    """Compare names and shapes of a set of tensors with what it must hold.

    Raises:
        ValueError: tensors are missing, are shards that were not gathered (DeepSpeed's have another shape), have
            another shape, or are not expected.
    """
    problems = [
        _some("only a shard", (name for name in expected if isinstance(tensors.get(name), DTensor))),
        _some("missing", expected.keys() - tensors.keys()),
        _some("unexpected", tensors.keys() - expected.keys()),
        _some(
            "of wrong shape",
            (
                f"{name} {tuple(tensors[name].shape)} instead of {shape}"
                for name, shape in expected.items()
                if name in tensors and tuple(tensors[name].shape) != tuple(shape)
            ),
        ),
    ]
    found = "; ".join(problem for problem in problems if problem)
    if found:
        raise ValueError(f"{where} does not hold the tensors that its configuration asks for: {found}.")


def _some(label: str, names: Iterable[str], limit: int = 3) -> str:
    ordered = sorted(names)
    if not ordered:
        return ""
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return f"{label}: {', '.join(ordered[:limit])}{more}"
