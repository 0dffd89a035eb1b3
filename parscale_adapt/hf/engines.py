"""Parameters that are not held as plain tensors: shares of a sharding engine, and packed 4-bit weights."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn


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


def keep_unpacked(model: nn.Module) -> None:
    """Let bitsandbytes' 4-bit layers on the CPU keep the layout that gradients flow through.

    Where the processor knows AVX512-BF16, they pack their weights in the first forward in evaluation mode, such as the
    look at a backbone before streams are attached, or a held-out evaluation; from then on no gradient reaches what lies
    before them (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
