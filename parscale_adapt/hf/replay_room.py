"""How many layers of a replayed chunk keep their activations, though every layer is checkpointed."""

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


_TENSORS_OF_A_LOSS = 3  # logarithmic probabilities, their gradient and that of the logits, all in float32


class ReplayRoom:
    """The memory that a loss over whole logits takes, which is free again when chunks of streams are replayed.

    A layer that keeps its activations in a replay, instead of computing them once more in the backward pass, takes one
    forward pass less. As many layers do as there is room for, so that the peak of a step stays the one at its loss:
    none under a fused loss, which never makes whole logits. The sizes are those of the step before.
    """

    def __init__(self) -> None:
        self.logits_bytes = 0
        self.num_layers = 0  # that are checkpointed
        self.num_tokens = 0  # of the samples, without streams
        self.bytes_of_states = 0  # the final hidden states of one stream
        self.bytes_per_token = 0.0  # that a layer keeps for its backward pass; 0 before that was measured

    def see_logits(self, lm_head: nn.Module, args: tuple, logits: torch.Tensor) -> None:
        """A forward hook of the LM head, whose logits are `[B, T, vocabulary]`."""
        if lm_head.training and torch.is_grad_enabled():
            self.logits_bytes = 4 * logits.numel()

    def begin_step(self, num_streams: int, chunk_size: int, gradient_bytes: int) -> int:
        """How many of the first layers are checkpointed in the replays of this step; the others keep their activations.

        Args:
            num_streams: `P`; the gradients of their final hidden states take some of the room.
            chunk_size: how many streams run at a time.
            gradient_bytes: what gradients of the decoder's parameters take that don't exist yet.
        """
        free, self.logits_bytes = _TENSORS_OF_A_LOSS * self.logits_bytes, 0
        if not self.bytes_per_token:
            return sys.maxsize
        free -= num_streams * self.bytes_of_states + gradient_bytes
        bytes_of_layer = self.bytes_per_token * self.num_tokens * chunk_size
        return max(0, self.num_layers - max(0, int(free / bytes_of_layer)))

    def measured(self, run: Callable, states: torch.Tensor, num_streams: int) -> Callable:
        """A layer that is about to be checkpointed, measured when it is computed again.

        Args:
            run: the layer.
            states: its input `[streams * B, T, H]`.
            num_streams: how many streams that are.
        """
        num_tokens, num_calls = states[..., 0].numel(), 0
        self.num_tokens, self.bytes_of_states = num_tokens // num_streams, states.nbytes // num_streams
        if self.bytes_per_token:
            return run

        def run_measured(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls != 2:
                return run(*args, **kwargs)
            tensors = _NewStorages()
            try:
                with tensors:
                    return run(*args, **kwargs)
            finally:
                self.bytes_per_token = tensors.live_bytes / num_tokens

        return run_measured


class _NewStorages(TorchDispatchMode):
    """Remembers the memory that operations inside the block allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[weakref.ref] = []

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {_pointer(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and _pointer(leaf) not in given:
                self.storages.append(weakref.ref(leaf.untyped_storage()))
        return output

    @property
    def live_bytes(self) -> int:
        """Of what is still in use."""
        storages = {storage._cdata: storage for ref in self.storages if (storage := ref()) is not None}
        return sum(storage.nbytes() for storage in storages.values())


def _pointer(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
