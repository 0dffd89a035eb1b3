"""What a thread says of the batch that it runs: which sample runs which adapter, and which streams run at a time."""

import threading

import torch

from ..core.layout import MixedLayout


class ThreadBatch(threading.local):
    """What holds in one thread.

    Args of [`parscale_adapt.tuner.layer.DecoderStreams.mixed_batches`], the layout of the running call, and the chunk of
    streams that runs, if it is not all of them.
    """

    adapters: tuple[str | None, ...] | None = None
    may_repeat = False
    layout: MixedLayout | None = None
    chunk: slice | None = None

    def __reduce__(self) -> tuple[type, tuple]:
        return ThreadBatch, ()  # a copy of a model runs no batch


# What a thread keeps for itself is read outside of compiled code, which would keep the first value that it saw.
@torch.compiler.disable
def layout_of_thread(batch: ThreadBatch) -> MixedLayout | None:
    return batch.layout


@torch.compiler.disable
def adapters_of_thread(batch: ThreadBatch) -> tuple[str | None, ...] | None:
    return batch.adapters


@torch.compiler.disable
def chunk_of_thread(batch: ThreadBatch) -> slice | None:
    return batch.chunk


@torch.compiler.disable
def lay_out_mixed(batch: ThreadBatch, streams_of: dict[str, int], batch_size: int, device: torch.device) -> None:
    """Let the running call have one layout for its `batch_size` samples, where they run different adapters."""
    if batch.adapters is None:
        return
    repeats, rest = divmod(batch_size, len(batch.adapters))
    if rest or not repeats or (repeats > 1 and not batch.may_repeat):
        raise ValueError(
            f"`adapter_names` must name one adapter per sample, got {len(batch.adapters)} names for {batch_size} samples."
        )
    adapters = [name for name in batch.adapters for _ in range(repeats)]
    num_streams = [1 if name is None else streams_of[name] for name in adapters]
    batch.layout = MixedLayout(adapters, num_streams, device)


@torch.compiler.disable
def forget_layout(batch: ThreadBatch) -> None:
    batch.layout = None
