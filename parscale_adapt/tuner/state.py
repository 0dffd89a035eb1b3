"""Adapter files: which tensors belong into one, under which names, and strict checks on the way out and in.

A file holds what the streams differ by (`<attention>.parscale_prefix_k` and `_v`, `<linear>.parscale_lora_A` and `_B`,
`<linear>.parscale_bias`), `<decoder>.parscale_aggregator.*`, shared LoRA by PEFT's own names
(`<module>.lora_A.weight`, `<module>.lora_B.weight`) and, where the backbone was trained, every parameter of it.
"""

import re
from collections.abc import Iterable, Iterator

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from ..core.prefix import ReparameterizedPrefix
from ..core.transforms import STREAM_TENSORS
from ..hf.engines import gathered, is_partitioned
from ..hf.stream_call import STREAMS_ATTRIBUTE
from .layer import ParScaleLayer
from .registration import PARAMETER_PREFIX


_LAYER_MARK = f".{STREAMS_ATTRIBUTE}.{PARAMETER_PREFIX}"
_NAME_IN_FILE = {place: name for name, place in STREAM_TENSORS.items()}
_SHARED_LORA = "|".join(LoraLayer.adapter_layer_names)
_IDLE = {ModulesToSaveWrapper: ("original_module",)}
_WRAPPED = ".base_layer"  # where PEFT's LoRA layers keep the backbone's own module


def checkpoint_key(key: str, adapter_name: str) -> str:
    """The name in a file of a tensor in the model, for example
    `layers.0.self_attn.parscale.parscale_prefix_k.default.weight` to `layers.0.self_attn.parscale_prefix_k`."""
    key, is_shared_lora = re.subn(rf"\.({_SHARED_LORA})\.{re.escape(adapter_name)}(\.weight)?$", r".\1\2", key)
    if is_shared_lora:
        return key
    host, mark, rest = key.replace(f"{_WRAPPED}.", ".").partition(_LAYER_MARK)
    container, _, parameter = rest.partition(f".{adapter_name}.")
    if not mark or not parameter:
        return key.replace(f"{_WRAPPED}.", ".")
    place = f"{container}.{parameter}"
    return f"{host}.{PARAMETER_PREFIX}{_NAME_IN_FILE.get(place, place)}"


def refuse_reparameterized(model: nn.Module, adapter_name: str) -> None:
    """Files hold folded prefixes, which don't fit into the MLPs of an adapter that is in training.

    Raises:
        ValueError: the prefixes of the adapter are reparameterised.
    """
    if is_reparameterized(model, adapter_name):
        raise ValueError(
            f"Adapter {adapter_name!r} computes its prefixes by an MLP (`init_weights='reparameterized'`), the file "
            "holds them folded: load the file into a new adapter, which goes on with plain prefixes."
        )


def fold_reparameterized(
    model: nn.Module, tensors: dict[str, torch.Tensor], adapter_name: str
) -> dict[str, torch.Tensor]:
    """Replace the tensors of each reparameterised prefix by the plain prefix that they compute."""
    folded = dict(tensors)
    for name, module in _reparameterized_prefixes(model, adapter_name):
        parameters = {key: folded.pop(f"{name}.{key}") for key, _ in module.named_parameters()}
        folded[f"{name}.weight"] = fold_prefix(module, parameters)
    return folded


def is_reparameterized(model: nn.Module, adapter_name: str) -> bool:
    """Whether an adapter computes its prefixes by an MLP."""
    return any(_reparameterized_prefixes(model, adapter_name))


def _reparameterized_prefixes(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, ReparameterizedPrefix]]:
    for name, module in model.named_modules():
        if isinstance(module, ReparameterizedPrefix) and name.endswith(f".{adapter_name}"):
            yield name, module


@torch.no_grad()
def fold_prefix(module: ReparameterizedPrefix, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """The plain prefix that a reparameterised one computes with these values of its parameters."""
    with torch.device("meta"):
        copy = ReparameterizedPrefix(module.shape)  # without the hooks that engines put on the module itself
    copy.load_state_dict(parameters, assign=True)
    return copy.folded().contiguous()


def adapter_parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter as they are trained, shared LoRA included, by their names in the model."""
    return {
        f"{name}.{container}.{key}": parameter
        for name, layer in model.named_modules()
        if isinstance(layer, ParScaleLayer | LoraLayer)
        for container in layer.adapter_layer_names
        for key, parameter in getattr(layer, container).named_parameters()
        if key == adapter_name or key.startswith(f"{adapter_name}.")
    }


def expected_adapter_shapes(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """Names in the model and shapes of all tensors of one adapter once folded."""
    shapes = {name: full_shape(value) for name, value in adapter_parameters(model, adapter_name).items()}
    for name, module in _reparameterized_prefixes(model, adapter_name):
        for key, _ in module.named_parameters():
            del shapes[f"{name}.{key}"]
        shapes[f"{name}.weight"] = module.shape
    return shapes


def saved_module_shapes(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """Names in the model and shapes of what one adapter trains in the modules named by `modules_to_save`."""
    return {
        f"{name}.modules_to_save.{adapter_name}.{key}": full_shape(tensor)
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        for key, tensor in module.modules_to_save[adapter_name].state_dict(keep_vars=True).items()
    }


@torch.no_grad()
def load_backbone(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy tensors into the backbone's own parameters, so that tied ones stay tied and no dtype changes."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        with gathered([parameters[name]], writer=0):
            parameters[name].copy_(tensor)


def backbone_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names in the model and shapes of all parameters outside adapters; a tied parameter stands once.

    A module of `modules_to_save` is the adapter's: its copy runs, and the original doesn't.
    """
    adapter_owned = tuple(
        f"{name}.{container}."
        for name, layer in model.named_modules()
        if isinstance(layer, ParScaleLayer | LoraLayer | ModulesToSaveWrapper)
        for container in (*layer.adapter_layer_names, *_IDLE.get(type(layer), ()))
    )
    return {
        name: full_shape(parameter)
        for name, parameter in model.named_parameters()
        if not name.startswith(adapter_owned or ("\0",))
    }


def trains_backbone(model: nn.Module) -> bool:
    """Whether a parameter outside adapters is trained."""
    backbone = backbone_shapes(model)
    return any(parameter.requires_grad for name, parameter in model.named_parameters() if name in backbone)


def embedding_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the embedding and the LM head, which PEFT saves beside an adapter once they were resized."""
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        f"{name}.{key}": full_shape(parameter)
        for name, module in model.named_modules()
        if any(module is embedding for embedding in embeddings)
        for key, parameter in module.named_parameters()
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
