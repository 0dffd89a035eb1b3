"""Which tensors operations make and keep, with no clock and no allocator."""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class NewTensors(TorchDispatchMode):
    """Collects the tensors that operations inside the block allocate, and keeps them alive.

    Args:
        known: tensors whose memory is not new.
    """

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.storages = {_storage(tensor) for tensor in known}
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in self.storages:
                self.storages.add(_storage(tensor))
                self.tensors.append(tensor)
        return output

    @property
    def sizes(self) -> list[int]:
        """Bytes of each of them."""
        return [tensor.untyped_storage().nbytes() for tensor in self.tensors]


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors made inside the block that live at the same time, and their `peak`."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in given:
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.seen:
            self.seen.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, num_bytes: int) -> None:
        self.live -= num_bytes


def bytes_kept_for_backward(function: Callable[[], torch.Tensor], given: Iterable[torch.Tensor]) -> int:
    """Bytes that a call keeps for its backward pass beside the tensors that it was given."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    assert result.requires_grad
    return sum(kept[storage] for storage in kept.keys() - {_storage(tensor) for tensor in given})
