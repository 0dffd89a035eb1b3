"""Streams in chunks: a decoder runs a few streams at a time, and keeps of each chunk its final hidden states only.

The streams of a sample meet nowhere before the aggregator, so the activations of all but one chunk can be released and
computed again in the backward pass, whose gradients stay exact (GradCache, arXiv 2101.06983).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from ..core.layout import UniformLayout
from .engines import FrozenAliases, is_partitioned, unchanged_module_stack
from .replay_room import ReplayRoom


# What transformers gives to whatever it checkpoints, and what torch's `CheckpointWrapper` has.
_LAYER_CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")


RunningChunk = Callable[[slice], AbstractContextManager[None]]


# Not traced: what runs inside is told to attention by the thread. Layers that are compiled one by one stay compiled.
@torch.compiler.disable
def run_in_chunks(
    run: Callable[[UniformLayout], Any],
    decoder: nn.Module,
    running_chunk: RunningChunk,
    num_streams: int,
    chunk_size: int,
    room: ReplayRoom,
) -> Any:
    """The output of a decoder on the rows of all streams, computed chunk by chunk.

    The last chunk keeps its activations: they are what the backward pass asks for first. It releases them before it
    replays the one before, since autograd takes nodes in the reverse order of their making.

    Args:
        run: the decoder on the rows of so many streams; with a cache only where no gradient is recorded.
        decoder: the decoder.
        running_chunk: inside the block, in its thread, the decoder's parts see these streams only.
        num_streams: `P`.
        chunk_size: how many streams run at a time.
        room: for activations that replays may keep.

    Returns:
        As `run` gives it: `[P * B, T, H]`, and what else there is, laid out by row.
    """
    running_chunk = _in_mode_of_forward(running_chunk, decoder)
    is_partitioned_here = any(is_partitioned(parameter) for parameter in decoder.parameters())
    if is_partitioned_here:
        running_chunk = _with_shares(running_chunk)
    # Processes gather layers together, while each may have room of its own.
    is_sharded = is_partitioned_here or any(isinstance(parameter, DTensor) for parameter in decoder.parameters())
    num_checkpointed = sys.maxsize
    if torch.is_grad_enabled() and not is_sharded:
        trained = [p for p in decoder.parameters() if p.requires_grad and p.grad is None]
        num_checkpointed = room.begin_step(num_streams, chunk_size, sum(parameter.nbytes for parameter in trained))
        run = _with_the_same_parameters(run, decoder)
    devices = {parameter.device for parameter in decoder.parameters()}
    on_devices = [torch.empty(0, device=device) for device in devices if device.type != "meta"]
    outputs = []
    for first in range(0, num_streams, chunk_size):
        chunk = slice(first, min(first + chunk_size, num_streams))
        is_last = chunk.stop == num_streams
        layers = partial(_LayersOfChunk, chunk, running_chunk, room, None if is_last else num_checkpointed)
        run_chunk = partial(_run_chunk, run, decoder, layers)
        if is_last or not torch.is_grad_enabled():
            outputs.append(run_chunk())
        else:
            # The tensors say whose random states are restored.
            outputs.append(checkpoint(run_chunk, *on_devices, use_reentrant=False))
    return _joined(outputs)


def _in_mode_of_forward(running_chunk: RunningChunk, decoder: nn.Module) -> RunningChunk:
    """For a model that is in evaluation mode, say, when `backward` is called: its dropout would draw no mask again."""
    was_training = {module: module.training for module in decoder.modules()}

    @contextmanager
    def running(chunk: slice) -> Iterator[None]:
        changed = [] if decoder.training == was_training[decoder] else list(was_training)
        now = {module: module.training for module in changed}
        for module in changed:
            module.training = was_training[module]
        try:
            with running_chunk(chunk):
                yield
        finally:
            for module in changed:
                module.training = now[module]

    return running


def _with_the_same_parameters(
    run: Callable[[UniformLayout], Any], decoder: nn.Module
) -> Callable[[UniformLayout], Any]:
    """For parameters that stand in a module for one forward only, as by `torch.func.functional_call`."""
    # But for those that accelerate brings for each call anew.
    before = [parameter for parameter in decoder.parameters() if not parameter.is_meta]

    def run_with_the_same(layout: UniformLayout) -> Any:
        now = set(map(id, decoder.parameters()))
        if not all(id(parameter) in now for parameter in before):
            raise ValueError(
                "Chunks of streams run once more in the backward pass, and the decoder has other parameters now than in its "
                "forward pass: call `backward` before they are replaced (`torch.func.functional_call` puts them back), or "
                "set `stream_chunk_size` to None."
            )
        return run(layout)

    return run_with_the_same


def _with_shares(running_chunk: RunningChunk) -> RunningChunk:
    """For parameters of which DeepSpeed ZeRO-3 holds a share.

    It takes a parameter away in place once its module has run, so a checkpoint, which keeps frozen tensors as they are,
    would find an empty one. That a replay stops early is needed here: the module whose backward pass asked for it goes on
    with the parameters that were gathered for it.
    """

    @contextmanager
    def running(chunk: slice) -> Iterator[None]:
        with running_chunk(chunk), FrozenAliases(), unchanged_module_stack():
            yield

    return running


class _LayersOfChunk:
    """What layers that are checkpointed one by one are checkpointed with, for one run of a chunk.

    Args:
        chunk: the streams that run.
        running_chunk: of [`run_in_chunks`].
        room: as there.
        num_checkpointed: how many of the first layers are; None for all of a chunk that is not replayed.
    """

    def __init__(self, chunk: slice, running_chunk: RunningChunk, room: ReplayRoom, num_checkpointed: int | None):
        self.chunk, self.running_chunk, self.room = chunk, running_chunk, room
        self.is_measured = num_checkpointed is None
        self.num_checkpointed = sys.maxsize if num_checkpointed is None else num_checkpointed
        self.num_called = 0

    def checkpoint(self, function: Callable, run: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run one layer by `function`, so that it is computed again for this chunk, or as it is."""
        self.num_called += 1
        if self.num_called > self.num_checkpointed:
            return run(*args, **kwargs)

        def run_in_chunk(*args: Any, **kwargs: Any) -> Any:
            with self.running_chunk(self.chunk):
                return run(*args, **kwargs)

        if self.is_measured and torch.is_grad_enabled():
            self.room.num_layers = self.num_called
            if self.num_called == 1 and args:
                run_in_chunk = self.room.measured(run_in_chunk, args[0], self.chunk.stop - self.chunk.start)
        return function(run_in_chunk, *args, **kwargs)


def _run_chunk(
    run: Callable[[UniformLayout], Any],
    decoder: nn.Module,
    layers_of_chunk: Callable[[], _LayersOfChunk],
    *on_devices: torch.Tensor,
) -> Any:
    layers = layers_of_chunk()
    with layers.running_chunk(layers.chunk), _layers_know(layers, decoder):
        return run(UniformLayout(layers.chunk.stop - layers.chunk.start))


@contextmanager
def _layers_know(layers: _LayersOfChunk, decoder: nn.Module) -> Iterator[None]:
    """Let what is checkpointed layer by layer inside the block go through `layers`."""
    functions = [
        (module, name, vars(module)[name])
        for module in decoder.modules()
        for name in _LAYER_CHECKPOINTS
        if name in vars(module)
    ]
    for module, name, function in functions:
        setattr(module, name, partial(layers.checkpoint, _in_one_graph(function)))
    try:
        yield
    finally:
        for module, name, function in functions:
            setattr(module, name, function)


def _in_one_graph(function: Callable) -> Callable:
    """Torch's checkpoint in its variant without a backward pass of its own, which gives the same gradients.

    Of the reentrant variant every chunk would add to a parameter's gradient by itself, where engines expect it once.
    """
    if isinstance(function, partial) and function.keywords.get("use_reentrant"):
        return partial(function.func, *function.args, **{**function.keywords, "use_reentrant": False})
    return function


def _joined(outputs: list[Any]) -> Any:
    """The outputs of all chunks, in the order of their rows."""
    first = outputs[0]
    if isinstance(first, Cache):
        return outputs[-1]  # each is a view of the same one
    if isinstance(first, torch.Tensor):
        return torch.cat(outputs)
    if isinstance(first, dict):  # as the outputs of transformers are
        return type(first)(**{name: _joined([output[name] for output in outputs]) for name in first})
    if isinstance(first, tuple):
        return tuple(_joined(list(items)) for items in zip(*outputs, strict=True))
    if first is None:
        return None
    raise ValueError(
        f"The decoder returns a {type(first).__name__}, which chunks of streams can't join: leave out what asks for it, "
        "or set `stream_chunk_size` to None."
    )
