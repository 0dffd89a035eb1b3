"""The final hidden states of all streams, where they meet in the aggregator, for losses that compare them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..core.aggregator import Aggregator
from ..core.decorrelation import stream_decorrelation


@contextmanager
def final_stream_states(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Inside the block, the final hidden states of each forward that has gradients.

        with final_stream_states(model) as states:
            loss = model(**batch).loss
            loss = loss + 0.1 * stream_decorrelation(states[-1], batch["attention_mask"])

    They are the very tensors that the aggregator mixes, in the graph of the forward; outside of the block nothing is
    kept of them.

    Args:
        model: in streams, wrapped by an engine or not.

    Yields:
        A list that grows by `[num_streams, batch, seq_len, hidden_size]` with every forward.

    Raises:
        ValueError: there is no aggregator, as with one stream.
    """
    states: list[torch.Tensor] = []

    def keep(aggregator: Aggregator, inputs: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            states.append(inputs[0].unflatten(0, (aggregator.num_streams, -1)))

    aggregators = [module for module in model.modules() if isinstance(module, Aggregator)]
    if not aggregators:
        raise ValueError(
            "There are no streams to compare: the model has no aggregator, since one stream is the plain backbone."
        )
    hooks = [aggregator.register_forward_pre_hook(keep) for aggregator in aggregators]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
        states.clear()


def diversity_term(states: list[torch.Tensor], inputs: dict[str, Any]) -> torch.Tensor:
    """[`stream_decorrelation`] of the latest forward, without the tokens that the batch's attention mask hides."""
    mask = inputs.get("attention_mask")
    is_by_token = isinstance(mask, torch.Tensor) and mask.shape == states[-1].shape[1:3]
    return stream_decorrelation(states[-1], mask if is_by_token else None)
