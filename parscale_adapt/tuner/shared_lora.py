"""LoRA on the backbone that all streams of an adapter share: PEFT's own layers, under the adapter's own name."""

import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


SUPPORTED_FIELDS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "fan_in_fan_out",
    "init_lora_weights",
)
_STARTS = (True, False, "gaussian")  # the others change the backbone's weights or need data


def lora_config(value: LoraConfig | Mapping[str, Any] | str) -> LoraConfig:
    """A copy of `value` that holds nothing but [`SUPPORTED_FIELDS`].

    Raises:
        TypeError: it is no [`peft.LoraConfig`], no dictionary and no JSON of one.
        ValueError: it has a field that LoRA doesn't know, or sets one that would change the backbone, train more than
            the low-rank weights, or need another kind of layer.
    """
    if isinstance(value, str):
        value = _read(value)
    if isinstance(value, Mapping):
        unknown = sorted(value.keys() - {item.name for item in dataclasses.fields(LoraConfig)})
        if unknown:
            raise ValueError(f"`lora` has unknown fields {unknown}: it can hold {', '.join(SUPPORTED_FIELDS)}.")
        value = LoraConfig(**value)
    elif type(value) is not LoraConfig:
        raise TypeError(f"`lora` must be a peft.LoraConfig or a dictionary, got {type(value).__name__}.")
    default, unchecked = LoraConfig(), {item.name for item in dataclasses.fields(PeftConfig)} | set(SUPPORTED_FIELDS)
    for item in dataclasses.fields(LoraConfig):
        if item.name not in unchecked and getattr(value, item.name) != getattr(default, item.name):
            raise ValueError(
                f"`lora` sets `{item.name}` to {getattr(value, item.name)!r}, which doesn't go with streams: it can "
                f"hold {', '.join(SUPPORTED_FIELDS)}."
            )
    if value.init_lora_weights not in _STARTS:
        raise ValueError(f"`init_lora_weights` in `lora` must be one of {_STARTS}, got {value.init_lora_weights!r}.")
    return LoraConfig(**lora_fields(value))


def _read(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"`lora` must be JSON such as '{{\"r\": 8}}', got {text!r}: {error}.") from error
    if not isinstance(value, dict):
        raise TypeError(f"`lora` must be a JSON object of LoraConfig's fields such as '{{\"r\": 8}}', got {text!r}.")
    return value


def lora_fields(config: LoraConfig) -> dict[str, Any]:
    """The fields of a LoRA configuration, ready for JSON."""
    fields = {name: getattr(config, name) for name in SUPPORTED_FIELDS}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}


def inject_shared_lora(
    model: nn.Module, configs: dict[str, LoraConfig], adapter_name: str, low_cpu_mem_usage: bool = False
) -> None:
    """Wrap the target modules of `model` in PEFT's LoRA layers, or give those that are wrapped one more adapter.

    PEFT activates the new adapter and freezes the rest; what should be active and trained is the caller's to restore.

    Args:
        model: the causal LM.
        configs: of all adapters with shared LoRA, `adapter_name` among them.
        adapter_name: the new adapter.
        low_cpu_mem_usage: as in PEFT, leave the new tensors on the meta device.

    Raises:
        ValueError: no module matches, or one that matches can't have low-rank weights.
    """
    config, own_configs = configs[adapter_name], vars(model).get("peft_config")
    excluded = config.exclude_modules
    config.exclude_modules = _and_trained_copies(excluded, model)
    model.peft_config = {name: config for name, config in configs.items() if name != adapter_name}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute in the model")
            inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage)
    finally:
        config.exclude_modules = excluded
        del model.peft_config
        if own_configs is not None:
            model.peft_config = own_configs


def _and_trained_copies(excluded: list[str] | str | None, model: nn.Module) -> list[str] | str | None:
    """`exclude_modules` that leaves alone what `modules_to_save` of another adapter copied, too."""
    copies = [
        f"{name}.{child}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for child, _ in module.named_modules()
        if child
    ]
    if not copies:
        return excluded
    if isinstance(excluded, str):
        return "|".join([f"({excluded})", *map(re.escape, copies)])
    return [*(excluded or ()), *copies]


@contextmanager
def modules_by_row(model: nn.Module, adapters_of_rows: Callable[[int], Sequence[str | None] | None]) -> Iterator[None]:
    """In batches that mix adapters, let every row run the shared LoRA and the `modules_to_save` of its own one, by PEFT's
    `adapter_names`.

    Args:
        model: the backbone.
        adapters_of_rows: the adapter of each of so many rows, None for the plain backbone; None where none are mixed.
    """

    def name_rows(
        module: LoraLayer | AuxiliaryTrainingWrapper, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        names = adapters_of_rows(len(args[0]))
        if names is None:
            return args, kwargs
        # LoRA layers pass by what they don't hold themselves.
        held = module._adapters if isinstance(module, AuxiliaryTrainingWrapper) else {*names}
        return args, {**kwargs, "adapter_names": [name if name in held and name else "__base__" for name in names]}

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, LoraLayer | AuxiliaryTrainingWrapper):
                stack.callback(module.register_forward_pre_hook(name_rows, with_kwargs=True).remove)
        yield


def remove_idle_lora(model: nn.Module) -> None:
    """Put the backbone's own modules back in place of LoRA layers that no adapter uses any more."""
    for name, module in reversed(list(model.named_modules())):  # PEFT nests layers around experts
        if isinstance(module, LoraLayer) and not module._get_available_adapters():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)


def unwrapped(module: nn.Module) -> nn.Module:
    """The backbone's own module behind a LoRA layer, or the argument itself."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def backbone_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the backbone by the names that they have without any adapter."""
    return dict(_walk(model, ""))


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    module = unwrapped(module)
    if isinstance(module, BaseTunerLayer):
        return
    yield name, module
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name)
