"""Token by token: how the streams of a model are weighed, and what each would have said on its own."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..hf.backbone import evaluating
from .stream_states import IGNORED_LABEL, find_streams


@dataclass(frozen=True)
class TokenStreams:
    """What the streams say at the `N` tokens of an answer, each of which is predicted from those before it.

    Attributes:
        weights: `[N, P]` the aggregator's weights where the token is predicted.
        entropy: `[N]` of these weights, in nats.
        top_tokens: `[P + 1, N]` the most likely token of every stream alone and, last, of their mixture.
        top_probs: `[P + 1, N]` its probability.
        token_probs: `[P + 1, N]` the probability of the token that stands there.
    """

    weights: torch.Tensor
    entropy: torch.Tensor
    top_tokens: torch.Tensor
    top_probs: torch.Tensor
    token_probs: torch.Tensor


@torch.no_grad()
def token_streams(
    model: PeftModel | PreTrainedModel, prompt: torch.Tensor, answer: torch.Tensor, max_logits: int = 2**26
) -> TokenStreams:
    """Run one plain forward over a prompt and its answer.

    Args:
        model: with an active ParScale adapter of at least two streams, or with streams of its own. It is left as it was.
        prompt: `[T]` token ids, at least one.
        answer: `[N]` token ids, at least one.
        max_logits: largest number of logits to hold at a time.

    Raises:
        TypeError, ValueError: as in [`parscale_adapt.analysis.stream_states.find_streams`].
    """
    streams = find_streams(model)
    labels = torch.cat([torch.full_like(prompt, IGNORED_LABEL), answer])
    batch: dict[str, Any] = {"input_ids": torch.cat([prompt, answer])[None], "labels": labels[None]}
    with evaluating(streams.model):
        states = streams.token_states(batch)
        hidden = torch.cat([states.hidden, states.mixture[None]])
        top_tokens, top_log_probs = streams.most_likely(hidden, max_logits)
        log_probs = streams.log_probs(hidden, states.targets, max_logits)
    weights = states.weights.cpu().double()
    return TokenStreams(weights, torch.special.entr(weights).sum(-1), top_tokens, top_log_probs.exp(), log_probs.exp())
