"""Prefixes that start as keys and values which the backbone itself gives to tokens.

Each stream gets tokens of its own, which the backbone generates, so that a stream starts as the backbone after some
context and training begins near the backbone's own loss.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..hf.backbone import ObservedStates, evaluating, input_device, observe_states
from ..hf.engines import gathered_parameters


def observe_token_states(
    model: PreTrainedModel, num_streams: int, num_prefix_tokens: int
) -> dict[str, ObservedStates]:
    """Keys and values `[P, heads, n, size]` of every attention module for `P` generated texts of `n` tokens.

    Rotary models see the tokens at positions -n to -1, just before the first real token; models with learned
    positions, which have none below 0, see them at 0 to n-1.
    """
    with streams_off(model):
        input_ids = generate_tokens(model, num_streams, num_prefix_tokens)
        positions = torch.arange(-num_prefix_tokens, 0).unsqueeze(0) if has_rotary_positions(model) else None
        return observe_states(model, input_ids, positions).states


def has_rotary_positions(model: PreTrainedModel) -> bool:
    """Whether attention sees where tokens stand by rotating queries and keys, so that only distances count."""
    return model.config.get_text_config().to_dict().get("rope_parameters") is not None


def generate_tokens(model: PreTrainedModel, num_rows: int, num_tokens: int) -> torch.Tensor:
    """Sample `[num_rows, num_tokens]` ids from the backbone, each row from its own first token."""
    config = model.config.get_text_config()
    first = torch.randint(config.vocab_size, (num_rows, 1), device=input_device(model))
    if num_tokens == 1:
        return first
    with evaluating(model), gathered_parameters(model):
        return model.generate(
            first,
            attention_mask=torch.ones_like(first),
            do_sample=True,
            min_new_tokens=num_tokens - 1,
            max_new_tokens=num_tokens - 1,
            eos_token_id=None,
            pad_token_id=0,
        )


@contextmanager
def streams_off(model: nn.Module) -> Iterator[None]:
    """Run the plain backbone inside the block."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before):
            layer._disable_adapters = disabled
