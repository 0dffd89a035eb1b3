"""Which row of a decoder's batch is which stream of which sample.

Outside a decoder a batch has `B` samples; inside, `R` rows, one per sample and stream, stream-major. Where states keep
batch `B` (caches, attention), the streams stand side by side as heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .streams import replicate


class Group(NamedTuple):
    """The samples of one batch that run the same adapter (None = the plain backbone)."""

    adapter: str | None
    num_streams: int
    samples: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class UniformLayout:
    """Every sample runs `num_streams` streams: `R = P * B`, row `p * B + b`."""

    num_streams: int

    def replicate(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[B, ...]` to `[R, ...]`."""
        return replicate(tensor, self.num_streams)

    def by_sample(self, states: torch.Tensor) -> torch.Tensor:
        """`[R, h, ...]` to a view `[B, P, h, ...]`, which takes no copy."""
        return states.unflatten(0, (self.num_streams, -1)).transpose(0, 1)

    def to_heads(self, states: torch.Tensor) -> torch.Tensor:
        """`[R, h, ...]` to `[B, P * h, ...]`: streams become heads, stream index major."""
        return self.by_sample(states).flatten(1, 2)

    def to_rows(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, P * h, ...]` to `[R, h, ...]`, the inverse of [`to_heads`]."""
        num_heads = states.shape[1] // self.num_streams
        return states.unflatten(1, (self.num_streams, num_heads)).transpose(0, 1).flatten(0, 1)

    def output_to_rows(self, output: torch.Tensor) -> torch.Tensor:
        """`[B, T, P * h, d]`, as attention functions return it, to a contiguous `[R, T, h, d]`."""
        by_sample = output.unflatten(2, (self.num_streams, -1))
        return by_sample.permute(2, 0, 1, 3, 4).flatten(0, 1).contiguous()

    def count_samples(self, num_rows: int) -> int:
        """B."""
        return num_rows // self.num_streams


class MixedLayout:
    """Samples with different adapters in one batch.

    `P` is the largest number of streams. Rows are stream-major: stream p of all samples that have one. As heads, a
    sample with fewer streams leaves the last ones at zero.

    Args:
        adapters: the adapter of every sample, None for the plain backbone.
        num_streams: how many streams each sample runs.
        device: of the batch.
    """

    def __init__(self, adapters: Sequence[str | None], num_streams: Sequence[int], device: torch.device):
        self.adapters = tuple(adapters)
        self.num_streams = max(num_streams)
        rows = [
            (sample, stream)
            for stream in range(self.num_streams)
            for sample in range(len(self.adapters))
            if stream < num_streams[sample]
        ]
        self.adapter_of_row = tuple(self.adapters[sample] for sample, _ in rows)
        self.sample_of_row = torch.tensor([sample for sample, _ in rows], device=device)
        self._slot_of_row = torch.tensor([s * self.num_streams + p for s, p in rows], device=device)
        self.groups = [self._group(adapter, num_streams) for adapter in dict.fromkeys(adapters)]

    def _group(self, adapter: str | None, num_streams: Sequence[int]) -> Group:
        samples = [sample for sample, name in enumerate(self.adapters) if name == adapter]
        device = self.sample_of_row.device
        rows = torch.isin(self.sample_of_row, torch.tensor(samples, device=device)).nonzero().flatten()
        return Group(adapter, num_streams[samples[0]], torch.tensor(samples, device=device), rows)

    def replicate(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[B, ...]` to `[R, ...]`."""
        return tensor[self.sample_of_row]

    def to_heads(self, states: torch.Tensor) -> torch.Tensor:
        """`[R, h, ...]` to `[B, P * h, ...]`."""
        slots = states.new_zeros(len(self.adapters) * self.num_streams, *states.shape[1:])
        slots[self._slot_of_row] = states
        return slots.view(len(self.adapters), self.num_streams * states.shape[1], *states.shape[2:])

    def to_rows(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, P * h, ...]` to `[R, h, ...]`."""
        num_heads = states.shape[1] // self.num_streams
        return states.reshape(-1, num_heads, *states.shape[2:])[self._slot_of_row]

    def count_samples(self, num_rows: int) -> int:
        """B."""
        return len(self.adapters)


StreamLayout = UniformLayout | MixedLayout
