"""What else than a prefix can make streams differ: low-rank weights or a bias per stream (paper, Appendix A, Table 6).

Both add to the output of a linear layer of the backbone. Shapes as in [`parscale_adapt.core.streams`].
"""

import math

import torch
from torch import nn


class StreamLora(nn.Module):
    """Low-rank weights per stream (LoRA, Hu et al., 2021): adds `alpha / rank * B_p A_p x` in stream p.

    `B` starts at zero, so that all streams start as the backbone; since each has an `A` of its own, their gradients
    differ from the first step on.

    Args:
        num_streams: `P`.
        in_features, out_features: sizes of the linear layer's input and output.
        rank: rows of `A`.
        alpha: numerator of the scale.
    """

    def __init__(self, num_streams: int, in_features: int, out_features: int, rank: int, alpha: float):
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(num_streams, rank, in_features))
        self.lora_B = nn.Parameter(torch.empty(num_streams, out_features, rank))
        self.scaling = alpha / rank

    def reset_parameters(self, init_std: float) -> None:
        """`A` uniform as in PEFT's LoRA, `B` at zero."""
        with torch.no_grad():
            for matrix in self.lora_A:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """What to add to the output `[P * B, T, out_features]` of an input `[P * B, T, in_features]`."""
        by_stream = states.reshape(self.lora_A.shape[0], -1, states.shape[-1])
        if not torch.is_autocast_enabled(states.device.type):
            by_stream = by_stream.to(self.lora_A.dtype)
        change = by_stream @ self.lora_A.mT @ self.lora_B.mT * self.scaling
        return change.view(*states.shape[:-1], -1)


class StreamBias(nn.Module):
    """A bias per stream (BitFit, Ben Zaken et al., 2021).

    Args:
        num_streams: `P`.
        out_features: size of the linear layer's output.
    """

    def __init__(self, num_streams: int, out_features: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(num_streams, out_features))

    def reset_parameters(self, init_std: float) -> None:
        """From N(0, `init_std`), so that the streams differ from the start."""
        nn.init.normal_(self.bias, std=init_std)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """What to add to an output of `P * B` rows: `[P * B, 1, out_features]`."""
        return self.bias.repeat_interleave(states.shape[0] // self.bias.shape[0], dim=0)[:, None]
