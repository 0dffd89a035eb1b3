"""Attention masks for streams: built once per sample, not once per stream."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .attention import SUPPORTED_IMPLEMENTATIONS
from .config_view import STREAMS
from .layout import MixedLayout


def _stream_mask(implementation: str) -> Callable:
    stock = ALL_MASK_ATTENTION_FUNCTIONS[implementation]

    def mask(batch_size: int, attention_mask: torch.Tensor | None, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """The mask of `batch_size` = R rows of tokens: one for each of their B samples, or, where the architecture
        computes with its masks (`masks_per_row`), one for each row."""
        streams = config.stream_decoder.parscale
        if implementation == "flex_attention" and isinstance(streams.layout, MixedLayout):
            raise ValueError(
                "`adapter_names` mixes adapters in one batch, whose samples flex_attention's block mask can't tell apart: "
                'call `set_attn_implementation("sdpa")` first.'
            )
        if not streams.masks_per_row:
            batch_size = streams.layout.count_samples(batch_size)
            attention_mask = None if attention_mask is None else attention_mask[:batch_size]  # those of stream 0
        made = stock(batch_size=batch_size, attention_mask=attention_mask, config=config, **kwargs)
        return _behind_prefix(made, streams.num_prefix_tokens) if isinstance(made, BlockMask) else made

    return mask


def _behind_prefix(mask: BlockMask, num_prefix_tokens: int) -> BlockMask:
    """The same mask with `n` visible keys in front."""
    if num_prefix_tokens == 0:
        return mask

    def shows(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
        token = (kv_idx - num_prefix_tokens).clamp(min=0)
        return (kv_idx < num_prefix_tokens) | mask.mask_mod(batch_idx, head_idx, q_idx, token)

    num_queries, num_keys = mask.seq_lengths
    device = mask.kv_num_blocks.device
    return create_block_mask(
        shows, mask.shape[0], None, num_queries, num_keys + num_prefix_tokens, device=device, _compile=True
    )


def register_stream_masks() -> None:
    """Make transformers find the mask functions under the names of the attention functions."""
    for implementation in SUPPORTED_IMPLEMENTATIONS:
        if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(STREAMS + implementation, _stream_mask(implementation))
