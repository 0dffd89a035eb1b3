"""Do the streams of a trained adapter differ, and what is the difference worth?

Shapes as in [`parscale_adapt.analysis.stream_states`]. Every figure is a mean over the tokens that have a target.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from ..core.streams import weighted_sum
from ..core.weight_statistics import WeightSums, weight_sums
from ..hf.backbone import evaluating
from .stream_states import StreamedModel, TokenStates, find_streams


MAX_LOGITS = 2**26
FINAL_STATES = "final"


@dataclass(frozen=True)
class LayerSimilarity:
    """Cosine similarity of the streams' hidden states after one layer.

    Attributes:
        layer: name of the layer inside the decoder, or `final` for the aggregator's input (after the last norm).
        cosine: `[P][P]`, mean over tokens.
        mean_cosine: mean over the pairs of different streams.
    """

    layer: str
    cosine: list[list[float]]
    mean_cosine: float


@dataclass(frozen=True)
class ReducedMixture:
    """The mixture of some of the streams.

    Attributes:
        streams: those that are left.
        removed: the one that was switched off last, None for the whole mixture.
        loss: loss of the mixture, weights renormalised over those that are left.
    """

    streams: list[int]
    removed: int | None
    loss: float


@dataclass(frozen=True)
class StreamDiagnostics:
    """What [`diagnose`] finds. Losses in nats per token.

    Attributes:
        num_streams: P.
        num_tokens: tokens with a target.
        mean_weight: of every stream in the aggregator.
        largest_share: share of tokens at which a stream has the largest weight; ties are divided.
        entropy: mean entropy of a token's weights, in nats.
        entropy_share: the same as a share of log P, its value for equal weights.
        own_loss: of every stream's hidden state through the LM head, without the others.
        mixture_loss: of the learned mixture, the model's own loss.
        plain_mean_loss: of the mean of the hidden states with equal weights.
        averaged_prediction_loss: of the mean of the streams' probabilities, which is what proposition 1 speaks about.
        irreducible_loss: E, as it was given.
        rho: correlation of the streams' residual errors, see [`residual_correlation`].
        pairwise_rho: `[P][P]`, the same for every pair of streams.
        layers: similarity of hidden states, layer by layer.
        removal: the mixture with the stream of the smallest mean weight switched off, then also the next, down to
            one. The aggregator still sees all streams; what is measured is what the mixture loses.
    """

    num_streams: int
    num_tokens: int
    mean_weight: list[float]
    largest_share: list[float]
    entropy: float
    entropy_share: float
    own_loss: list[float]
    mixture_loss: float
    plain_mean_loss: float
    averaged_prediction_loss: float
    irreducible_loss: float
    rho: float
    pairwise_rho: list[list[float]]
    layers: list[LayerSimilarity]
    removal: list[ReducedMixture]


def residual_correlation(own_loss: float, averaged_loss: float, num_streams: int, irreducible_loss: float) -> float:
    """The rho of proposition 1, for which equation 4 gives exactly these losses.

    The proposition calls `d_i = (p_i - p) / p` the residual of stream `i`, where `p` is the true probability of the
    next token and `p_i` the stream's; rho is the correlation of `d_i` and `d_j`, and the streams' probabilities are
    averaged. With `E[d_i] = 0` and to second order, a stream has loss `E + E[d_i^2] / 2` and the average of P streams
    has `E + E[d_i^2] / 2 * ((P - 1) * rho + 1) / P`. `p` is unknown, so neither residuals nor their correlation can be
    computed token by token; but all other quantities can be measured, and so rho follows:

        rho = (P * (averaged_loss - E) / (own_loss - E) - 1) / (P - 1)

    It is 1 for streams that predict the same, 0 if averaging P streams divides the loss above E by P. A larger E
    gives a smaller rho, so `irreducible_loss=0` gives an upper bound.

    Args:
        own_loss: mean of the losses of the P streams, each on its own.
        averaged_loss: loss of the mean of their probabilities.
        num_streams: P.
        irreducible_loss: E, the loss of a perfect model of the data, as a fitted scaling law gives it.
    """
    ratio = (averaged_loss - irreducible_loss) / (own_loss - irreducible_loss)
    return (num_streams * ratio - 1) / (num_streams - 1)


@torch.no_grad()
def diagnose(
    model: PeftModel,
    batches: Iterable[Mapping[str, Any]],
    irreducible_loss: float = 0.0,
    max_logits: int = MAX_LOGITS,
) -> StreamDiagnostics:
    """Measure the streams of the active adapter.

    Args:
        model: with an active ParScale adapter of at least two streams. It is left as it was.
        batches: inputs with `labels`, such as a DataLoader of packed rows with
            [`parscale_adapt.data.PackedCollator`]. Gone through twice: the first time for the weights, which decide
            in which order the streams are switched off.
        irreducible_loss: E of the data, see [`residual_correlation`]; 0 makes rho an upper bound.
        max_logits: largest number of logits to hold at a time.

    Raises:
        TypeError, ValueError: as in [`parscale_adapt.analysis.stream_states.find_streams`]; ValueError also where no
            token has a target, or where `irreducible_loss` is negative or not below every measured loss.
    """
    if not 0 <= irreducible_loss < math.inf:
        raise ValueError(f"`irreducible_loss` must be a loss of at least 0, got {irreducible_loss}.")
    streams = find_streams(model)
    with evaluating(streams.model):
        weights = _sum_weights(streams, batches)
        if weights is None or weights.num_tokens == 0:
            raise ValueError("no token of the data has a target, so there is nothing to measure.")
        order = sorted(range(streams.num_streams), key=lambda stream: (weights.weights[stream].item(), stream))
        sums = _Sums(streams.num_streams, order, max_logits)
        for batch in batches:
            sums.add(streams, batch)
    if sums.num_tokens != weights.num_tokens:
        raise ValueError(
            f"`batches` gave {weights.num_tokens} tokens the first time and {sums.num_tokens} the second: pass a list "
            "or a DataLoader, which can be gone through twice."
        )
    return _summary(weights, sums, irreducible_loss)


def _sum_weights(streams: StreamedModel, batches: Iterable[Mapping[str, Any]]) -> WeightSums | None:
    total = None
    for batch in batches:
        sums = weight_sums(streams.token_states(batch).weights)
        total = sums if total is None else total + sums
    return total


class _Sums:
    """Sums over tokens of losses and similarities, in double precision.

    Args:
        num_streams: P.
        order: streams in the order in which they are switched off.
        max_logits: largest number of logits to hold at a time.
    """

    def __init__(self, num_streams: int, order: Sequence[int], max_logits: int):
        self.order = list(order)
        self.max_logits = max_logits
        self.num_tokens = 0
        # P streams, learned mixture, plain mean, and the mixtures of P - 1 to 2 streams.
        self.losses = torch.zeros(2 * num_streams, dtype=torch.double)
        self.averaged_prediction = torch.zeros((), dtype=torch.double)
        self.averaged_pairs = torch.zeros(num_streams, num_streams, dtype=torch.double)
        self.cosines: dict[str, torch.Tensor] = {}
        self.cosine_counts: dict[str, int] = {}

    def add(self, streams: StreamedModel, batch: Mapping[str, Any]) -> None:
        states = streams.token_states(batch, self._add_cosines)
        if states.targets.numel() == 0:
            return
        self._add_cosines(FINAL_STATES, states.hidden)
        mixtures = torch.cat([states.mixture[None], _other_mixtures(states, self.order)])
        log_probs = streams.log_probs(torch.cat([states.hidden, mixtures]), states.targets, self.max_logits)
        self.num_tokens += states.targets.numel()
        self.losses -= log_probs.sum(1)
        own = log_probs[: streams.num_streams]
        self.averaged_prediction -= (own.logsumexp(0) - math.log(len(own))).sum()
        self.averaged_pairs -= (torch.logaddexp(own[:, None], own[None]) - math.log(2)).sum(-1)

    def _add_cosines(self, layer: str, hidden: torch.Tensor) -> None:
        if hidden.shape[1] == 0:
            return
        directions = torch.nn.functional.normalize(hidden.float(), dim=-1).flatten(1)
        total = (directions @ directions.T).cpu().double()
        self.cosines[layer] = self.cosines.get(layer, 0) + total
        self.cosine_counts[layer] = self.cosine_counts.get(layer, 0) + hidden.shape[1]


def _other_mixtures(states: TokenStates, order: Sequence[int]) -> torch.Tensor:
    """`[P - 1, N, H]`: the plain mean of all streams, then the mixtures of all but the first one, two, ... of `order`.

    That of a single stream is left out, since it is the stream itself.
    """
    choices = [torch.full_like(states.weights, 1 / len(order))]
    for num_removed in range(1, len(order) - 1):
        left = states.weights.clamp(min=torch.finfo(states.weights.dtype).tiny)
        left[:, list(order[:num_removed])] = 0
        choices.append(left / left.sum(-1, keepdim=True))
    return torch.cat([weighted_sum(states.hidden, weights[None]) for weights in choices])


def _summary(weights: WeightSums, sums: _Sums, irreducible_loss: float) -> StreamDiagnostics:
    num_streams, num_tokens = len(sums.order), sums.num_tokens
    losses = (sums.losses / num_tokens).tolist()
    own, (mixture, plain_mean, *reduced) = losses[:num_streams], losses[num_streams:]
    averaged = sums.averaged_prediction.item() / num_tokens
    pairs = (sums.averaged_pairs / num_tokens).tolist()
    lowest = min(averaged, *own, *(loss for row in pairs for loss in row))
    if irreducible_loss >= lowest:
        raise ValueError(
            f"`irreducible_loss` must lie below every loss of the streams, got {irreducible_loss:g}, but the lowest "
            f"is {lowest:.4f}."
        )
    removal = [ReducedMixture(sorted(sums.order), None, mixture)]
    for index, loss in enumerate([*reduced, own[sums.order[-1]]]):
        removal.append(ReducedMixture(sorted(sums.order[index + 1 :]), sums.order[index], loss))
    entropy = weights.entropy.item() / num_tokens
    return StreamDiagnostics(
        num_streams=num_streams,
        num_tokens=num_tokens,
        mean_weight=(weights.weights / num_tokens).tolist(),
        largest_share=(weights.largest / num_tokens).tolist(),
        entropy=entropy,
        entropy_share=entropy / math.log(num_streams),
        own_loss=own,
        mixture_loss=mixture,
        plain_mean_loss=plain_mean,
        averaged_prediction_loss=averaged,
        irreducible_loss=irreducible_loss,
        rho=residual_correlation(sum(own) / num_streams, averaged, num_streams, irreducible_loss),
        pairwise_rho=[
            [residual_correlation((own[i] + own[j]) / 2, pairs[i][j], 2, irreducible_loss) for j in range(num_streams)]
            for i in range(num_streams)
        ],
        layers=[_similarity(layer, total / sums.cosine_counts[layer]) for layer, total in sums.cosines.items()],
        removal=removal,
    )


def _similarity(layer: str, cosine: torch.Tensor) -> LayerSimilarity:
    num_streams = len(cosine)
    mean = (cosine.sum() - cosine.trace()) / (num_streams * (num_streams - 1))
    return LayerSimilarity(layer, cosine.tolist(), mean.item())
