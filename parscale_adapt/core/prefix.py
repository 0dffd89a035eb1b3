"""Learned prefix keys or values of one attention layer: how they are stored and how they start."""

import torch
from torch import nn

from .streams import streams_of_chunk


class StreamPrefix(nn.Module):
    """The prefix keys (or values) of one attention layer, one set per stream.

    The tensor is read in this module's own forward only, as DeepSpeed ZeRO-3 and FSDP require.

    Args:
        shape: `[P, num_key_value_heads, n, head_size]`.
    """

    def __init__(self, shape: tuple[int, int, int, int]):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def reset_parameters(self, init_std: float) -> None:
        """Prefix from N(0, `init_std`) (paper, Appendix A)."""
        nn.init.normal_(self.weight, std=init_std)

    def forward(self, dtype: torch.dtype, chunk: slice | None = None) -> torch.Tensor:
        """The prefix `[P, num_key_value_heads, n, head_size]` as a new tensor, which outlives a sharded parameter.

        Args:
            dtype: of the result.
            chunk: the streams to give, `P` less than all.
        """
        return streams_of_chunk(self.weight, chunk).to(dtype, copy=True)


class ReparameterizedPrefix(nn.Module):
    """A prefix computed from a small matrix by an MLP while training; [`folded`] gives the plain tensor.

    As in prefix tuning (Li and Liang, 2021, section 4.3), which the paper's Appendix A follows; here the MLP belongs
    to one layer, so that it runs inside that layer's checkpointed block.

    Args:
        shape: `[P, num_key_value_heads, n, head_size]` of the computed prefix.
    """

    def __init__(self, shape: tuple[int, int, int, int]):
        super().__init__()
        num_streams, num_heads, num_prefix_tokens, head_size = shape
        self.shape = shape
        self.embedding = nn.Parameter(torch.empty(num_streams, num_prefix_tokens, head_size))
        self.hidden = nn.Linear(head_size, 2 * head_size)
        self.output = nn.Linear(2 * head_size, num_heads * head_size)

    def reset_parameters(self, init_std: float) -> None:
        """The matrix from N(0, 1), weights from N(0, `init_std`), biases at 0."""
        nn.init.normal_(self.embedding)
        for linear in (self.hidden, self.output):
            nn.init.normal_(linear.weight, std=init_std)
            nn.init.zeros_(linear.bias)

    def folded(self, chunk: slice | None = None) -> torch.Tensor:
        """The prefix as a plain tensor `[P, num_key_value_heads, n, head_size]`, or that of some streams."""
        _, num_heads, num_prefix_tokens, head_size = self.shape
        prefix = self.output(torch.tanh(self.hidden(streams_of_chunk(self.embedding, chunk))))
        return prefix.view(-1, num_prefix_tokens, num_heads, head_size).transpose(1, 2)

    def forward(self, dtype: torch.dtype, chunk: slice | None = None) -> torch.Tensor:
        """Compute the prefix, as [`StreamPrefix.forward`]."""
        return self.folded(chunk).to(dtype)
