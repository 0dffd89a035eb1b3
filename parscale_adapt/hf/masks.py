"""Attention masks for streams: built once per sample, not once per stream."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..core.joined_attention import can_join
from ..core.layout import MixedLayout
from .config_view import STREAMS
from .prefixed_attention import SUPPORTED_IMPLEMENTATIONS
from .stream_call import decoder_streams


def _stream_mask(implementation: str) -> Callable:
    def mask(batch_size: int, attention_mask: torch.Tensor | None, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """The mask of `batch_size` = R rows of tokens: one for each of their B samples, or, where the architecture
        computes with its masks (`masks_per_row`), one for each row."""
        streams = decoder_streams(config)
        layout, _, num_prefix_tokens, _ = streams.running
        if not streams.masks_per_row:
            batch_size = layout.count_samples(batch_size)
            attention_mask = None if attention_mask is None else attention_mask[:batch_size]  # those of stream 0
        if implementation == "flex_attention":
            if isinstance(layout, MixedLayout):
                raise ValueError(
                    "`adapter_names` can't mix adapters under flex_attention, whose block mask has no rows to select: "
                    'load the backbone with `attn_implementation="sdpa"`.'
                )
            if num_prefix_tokens > 0 and _is_decoding(**kwargs):
                # No block of a few queries over a cache can be skipped, and a dense mask lets them join scores.
                return _stock("sdpa", batch_size, attention_mask, config, **kwargs | {"allow_is_causal_skip": False})
            if num_prefix_tokens > 0:
                kwargs |= _behind_prefix(num_prefix_tokens, attention_mask, **kwargs)
                attention_mask = None
        return _stock(implementation, batch_size, attention_mask, config, **kwargs)

    return mask


def _stock(
    implementation: str, batch_size: int, attention_mask: torch.Tensor | None, config: PreTrainedConfig, **kwargs: Any
) -> Any:
    # Looked up at the call, as attention functions are, so that one that was registered later is found.
    stock = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
    return stock(batch_size=batch_size, attention_mask=attention_mask, config=config, **kwargs)


def _is_decoding(q_length: int, kv_length: int, **kwargs: Any) -> bool:
    return q_length < kv_length and can_join(q_length, kv_length)


def _behind_prefix(
    num_prefix_tokens: int,
    attention_mask: torch.Tensor | None,
    mask_function: Callable,
    kv_length: int,
    kv_offset: int,
    **kwargs: Any,
) -> dict[str, Any]:
    """The arguments of a block mask that has `n` visible keys in front and knows the padding."""
    if attention_mask is not None and not attention_mask.all():
        # Here, so that code in checkpoints runs everything else with a transformers that renames them.
        from transformers.masking_utils import and_masks, padding_mask_function, prepare_padding_mask

        padding_mask = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        mask_function = and_masks(mask_function, padding_mask_function(padding_mask))

    def shows(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
        token = kv_idx.clamp(min=kv_offset)
        # Not `|`, for which torch 2.13 generates C++ that doesn't compile.
        return torch.where(kv_idx < kv_offset, True, mask_function(batch_idx, head_idx, q_idx, token))

    return {
        "mask_function": shows,
        "kv_length": kv_length + num_prefix_tokens,
        "kv_offset": kv_offset - num_prefix_tokens,
    }


def register_stream_masks() -> None:
    """Make transformers find the mask functions under the names of the attention functions."""
    for implementation in SUPPORTED_IMPLEMENTATIONS:
        if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(STREAMS + implementation, _stream_mask(implementation))
