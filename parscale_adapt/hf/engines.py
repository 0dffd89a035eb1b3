"""Parameters that are not held as plain tensors: shares of a sharding engine, offloaded weights, packed 4-bit weights."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


@contextmanager
def gathered_parameters(model: nn.Module) -> Iterator[None]:
    """Gather DeepSpeed ZeRO-3 partitions module by module, so that a forward works before the engine exists."""
    if not any(is_partitioned(parameter) for parameter in model.parameters()):
        yield
        return
    import deepspeed

    contexts: dict[nn.Module, ExitStack] = {}

    def gather(module: nn.Module, args: tuple) -> None:
        contexts[module] = ExitStack()
        parameters = list(module.parameters(recurse=False))
        contexts[module].enter_context(deepspeed.zero.GatheredParameters(parameters))

    def release(module: nn.Module, args: tuple, output: object) -> None:
        contexts.pop(module).close()

    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    with ExitStack() as stack:
        for module in owners:
            stack.callback(module.register_forward_pre_hook(gather).remove)
            stack.callback(module.register_forward_hook(release, always_call=True).remove)
        yield


@contextmanager
def gathered(parameters: list[nn.Parameter], writer: int | None = None) -> Iterator[None]:
    """Hold the full values of parameters that DeepSpeed ZeRO-3 partitions; every rank must enter.

    What the block writes into them is lost, unless `writer` names the rank whose values all ranks take over.
    """
    if not any(is_partitioned(parameter) for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=writer):
        yield


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed ZeRO-3 holds only a share of `parameter` here."""
    return hasattr(parameter, "ds_id")


class FrozenAliases(TorchFunctionMode):
    """Operations inside the block get frozen parameters that DeepSpeed ZeRO-3 partitions as tensors that share their
    values, which what they save for the backward pass keeps, also when the parameter is taken away in place."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", None) not in ("__get__", "__set__"):  # attributes are those of the parameter
            args = tuple(_frozen_alias(argument) for argument in args)
            kwargs = {name: _frozen_alias(argument) for name, argument in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _frozen_alias(value: Any) -> Any:
    is_frozen = isinstance(value, nn.Parameter) and is_partitioned(value) and not value.requires_grad
    return value.detach() if is_frozen else value


@contextmanager
def unchanged_module_stack() -> Iterator[None]:
    """Take from DeepSpeed ZeRO-3's stack of running modules those that the block leaves by stopping early."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    depth = len(FWD_MODULE_STACK)
    try:
        yield
    finally:
        del FWD_MODULE_STACK[depth:]


def keep_unpacked(model: nn.Module) -> None:
    """Let bitsandbytes' 4-bit layers on the CPU keep the layout that gradients flow through.

    Where the processor knows AVX512-BF16, they pack their weights in the first forward in evaluation mode, such as the
    look at a backbone before streams are attached, or a held-out evaluation; from then on no gradient reaches what lies
    before them (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def execution_device(module: nn.Module) -> torch.device:
    """The device on which a module computes, also where accelerate keeps its weights elsewhere between two calls."""
    for part in module.modules():
        for hook in _hooks_of_accelerate(part):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    parameters = list(module.parameters())
    return next((parameter.device for parameter in parameters if not parameter.is_meta), parameters[0].device)


def offloaded_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules, by name, whose own weights accelerate brings for each call and drops after it."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(getattr(hook, "offload", False) for hook in _hooks_of_accelerate(module))
    }


def stored_value(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter by its name, or what accelerate keeps of it in memory or on disk while it is offloaded."""
    module_name, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    parameter = getattr(module, parameter_name)
    if parameter.is_meta:
        for hook in _hooks_of_accelerate(module):
            if getattr(hook, "offload", False):
                return hook.weights_map[parameter_name]
    return parameter


def refuse_absent_weights(model: nn.Module) -> None:
    """Raises ValueError where the model can't run since weights are on the meta device, or where accelerate's hooks
    would look for the weights of streams, too."""
    offloaded = offloaded_modules(model)
    for name, module in offloaded.items():
        if any(getattr(hook, "place_submodules", False) for hook in _hooks_of_accelerate(module)):
            raise ValueError(
                f"accelerate brings all weights inside `{name}` at once (`preload_module_classes`), and would look for "
                "those of streams among them: dispatch the backbone without `preload_module_classes`."
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta and name.rpartition(".")[0] not in offloaded:
            raise ValueError(
                f"The backbone's weights are not there: `{name}` is on the meta device and nothing brings it "
                "(`PeftModel.from_pretrained` takes offloading to disk away). Load the backbone into memory, or put a new "
                "adapter on it by `get_peft_model` and the saved one beside that by `load_adapter`."
            )


def _hooks_of_accelerate(module: nn.Module) -> Iterator[Any]:
    hook = vars(module).get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
