"""Prefixes that hardly change what the backbone computes, and yet learn from the first step on.

Attention over a prefix and the text is `(1 - m) * text + m * prefix`, where `m` is the share of the softmax that the
prefix gets. Gradients of the prefix are proportional to `m`, so `m` should be as large as a small change of the loss
allows. Keys start as those of tokens, as in [`observe_token_states`], and are moved away from the backbone's own
queries until `m` is small; values start as what the head gives on average, the constant that changes least.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..hf.backbone import ObservedStates, evaluating, find_decoder
from ..hf.engines import gathered_parameters
from ..hf.observer import AttentionObserver, observe_attention
from ..hf.prefixed_attention import FAMILIES, AttentionInputs, call_stock
from .layer import AttentionStreams
from .start import generate_tokens, has_rotary_positions, observe_token_states, streams_off


logger = logging.getLogger(__name__)

TOLERANCE = 0.005
"""Nats by which the loss may differ from the backbone's before the first step."""

_SHARES = (0.03, 0.01, 0.003)  # of the softmax, for a prefix; the largest that keeps the loss is taken
# Of each of three texts: keys are fitted to one, the share is chosen on one, the difference is measured on one. Many
# short rows, since queries of first tokens, on which attention sinks rest, are unlike all others.
_NUM_ROWS, _NUM_TOKENS = (64, 16, 16), 32
_FURTHEST = 4096  # tokens behind the prefix
_LOOKS, _ROUNDS, _STEP, _RIDGE = 3, 6, 0.6, 1e-3  # of moving keys


class NearIdentity(NamedTuple):
    """How near a start came to the backbone.

    Args:
        difference: loss with streams minus the backbone's own, nats per token of text that the backbone generated and
            that nothing was fitted to.
        share: of the softmax that the prefix was allowed.
        num_tokens: that were predicted.
    """

    difference: float
    share: float
    num_tokens: int

    def __str__(self) -> str:
        return (
            f"before the first step the loss differs from the backbone's by {self.difference:+.4f} nats on "
            f"{self.num_tokens} generated tokens (at most {TOLERANCE} wanted; prefixes hold up to {self.share:.1%} of a "
            "head's attention)"
        )


def start_near_identity(
    model: PreTrainedModel, adapter_name: str, num_streams: int, num_prefix_tokens: int
) -> NearIdentity:
    """Fit the prefixes of an attached adapter to text that the backbone generates, and measure them on other text.

    Logs the figure, as a warning where the loss differs by more than `TOLERANCE`.
    """
    with streams_off(model):
        states = observe_token_states(model, num_streams, num_prefix_tokens)
        rows = _sample_rows(model)
        fitted, compared, measured = rows.split(_NUM_ROWS)
        starts = {share: _fit(model, fitted, states, share) for share in _SHARES}
        expected, own_loss = _log_probabilities(model, compared), _loss(_log_probabilities(model, measured), measured)
    layers = {name: model.get_submodule(f"{name}.parscale") for name in states}

    def take(share: float) -> None:
        for name, layer in layers.items():
            assert isinstance(layer, AttentionStreams)
            layer.start_from(adapter_name, *starts[share][name])

    with _only_adapter(model, adapter_name):
        divergences = {}
        # Every rank of a sharded model has to run as often as the others, so none stops at what it finds.
        for share in _SHARES:
            take(share)
            found = _log_probabilities(model, compared)
            divergences[share] = F.kl_div(found, expected, log_target=True, reduction="none").sum(-1).mean().item()
        near = [share for share in _SHARES if divergences[share] <= TOLERANCE / 4]  # in other rows it may be larger
        share = near[0] if near else min(_SHARES, key=divergences.__getitem__)
        take(share)
        difference = _loss(_log_probabilities(model, measured), measured) - own_loss
    result = NearIdentity(difference, share, measured[:, 1:].numel())
    if abs(difference) <= TOLERANCE:
        logger.info("Near-identity start: %s.", result)
    else:
        logger.warning(
            "Near-identity start: %s. That is no near identity on this backbone: train from there, "
            "or start with `init_weights='tokens'`.",
            result,
        )
    return result


def _sample_rows(model: PreTrainedModel) -> torch.Tensor:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _NUM_TOKENS
    return generate_tokens(model, sum(_NUM_ROWS), min(_NUM_TOKENS, longest))


def _positions(model: PreTrainedModel, num_rows: int, num_tokens: int) -> torch.Tensor | None:
    """Later rows of rotary models stand further from the start, for queries far behind a prefix turn away from it."""
    if not has_rotary_positions(model):
        return None
    config = model.config.get_text_config()
    original = config.rope_parameters.get("original_max_position_embeddings")  # beyond it, frequencies may change
    longest = min(original or _FURTHEST, getattr(config, "max_position_embeddings", _FURTHEST), _FURTHEST)
    num_far = num_rows // 3
    first = torch.zeros(num_rows, dtype=torch.long)
    first[num_rows - num_far :] = (longest - num_tokens) * torch.arange(1, num_far + 1) ** 2 // num_far**2
    return first.unsqueeze(1) + torch.arange(num_tokens)


@torch.no_grad()
def _fit(
    model: PreTrainedModel, input_ids: torch.Tensor, states: dict[str, ObservedStates], share: float
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    observer, decoder = _Fitter(model, states, share), model.get_submodule(find_decoder(model))
    positions = _positions(model, *input_ids.shape)
    options = {} if positions is None else {"position_ids": positions.to(input_ids.device)}
    with evaluating(model), gathered_parameters(model), observe_attention(model, observer):
        decoder(input_ids=input_ids, use_cache=False, **options)
    return observer.starts


class _Fitter(AttentionObserver):
    """Moves the keys of every attention module until no query of a text gives a prefix more than `share`."""

    def __init__(self, model: nn.Module, states: dict[str, ObservedStates], share: float):
        self.names = {module: name for name, module in model.named_modules()}
        self.states = states
        self.share = share
        self.starts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def see_attention(self, call: AttentionInputs, implementation: str) -> None:
        name = self.names[call.module]
        states, num_heads = self.states[name], call.key.shape[1]
        output = _by_query(call_stock(call)[0], num_heads)
        value = output.float().mean(1)[None, :, None].expand_as(states.value)
        queries = (
            call.query.float().unflatten(1, (num_heads, -1)).permute(1, 0, 3, 2, 4)
        )  # heads, rows, T, group, size
        # All positions count alike in logarithm: early ones are few, and what they see goes into all others.
        weights = 1 / (1 + torch.arange(queries.shape[2], device=queries.device, dtype=torch.float32))
        weights = weights.view(1, 1, -1, 1).expand(queries.shape[:4]).flatten(1)
        queries = queries.flatten(1, 3)
        keys = [
            _moved_key(call, implementation, key, queries, weights, self.share) for key in states.key.float().unbind()
        ]
        self.starts[name] = (torch.stack(keys), value)


def _by_query(output: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`[rows, T, heads, size]` as attention gives it to `[key_value_heads, rows * T * group, size]`."""
    return output.unflatten(2, (num_heads, -1)).permute(2, 0, 1, 3, 4).flatten(1, 3)


def _moved_key(
    call: AttentionInputs,
    implementation: str,
    key: torch.Tensor,
    queries: torch.Tensor,
    weights: torch.Tensor,
    share: float,
) -> torch.Tensor:
    """Move the keys `[heads, n, size]` of each head by one vector, which lowers the logit of their share by `query @ vector`.

    Ridge regression over those queries `[heads, N, size]` that give the prefix too much, which are found anew each round.
    """
    size = queries.shape[-1]
    scaling = call.options.get("scaling") or size**-0.5
    power = _dot(queries.square().sum(-1)[:, None], weights)[:, 0] / size
    ridge = (_RIDGE * power + 1e-12)[:, None, None] * torch.eye(size, device=queries.device)
    allowed = torch.logit(torch.tensor(share)).item()
    moved = torch.zeros_like(key[:, 0])
    for _ in range(_LOOKS):  # with a soft cap, logits don't fall by just `query @ vector`
        held = _share_of_prefix(call, implementation, key - moved[:, None])
        wanted = (torch.logit(held, eps=1e-6) - allowed) / scaling + _dot(queries, moved)
        for _ in range(_ROUNDS):
            active = queries * (weights * (wanted > _dot(queries, moved)))[..., None]
            solution = torch.linalg.solve(active.mT @ queries + ridge, _dot(active.mT, wanted))
            moved = torch.lerp(moved, solution, _STEP)
    return key - moved[:, None]


def _dot(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _share_of_prefix(call: AttentionInputs, implementation: str, key: torch.Tensor) -> torch.Tensor:
    """`[heads, N]`: what attention gives where the prefix's values are ones and all others zeros, so that masks, windows,
    soft caps, sinks and biases are those of the backbone."""
    num_heads, value = call.key.shape[1], torch.zeros_like(call.value)
    ones = value.new_ones(1, num_heads, key.shape[1], value.shape[-1])
    prefix = (key[None].to(call.key.dtype), ones)
    output, _ = FAMILIES[implementation](call._replace(value=value, prefix=prefix))
    return _by_query(output, num_heads)[..., 0].float()


@torch.no_grad()
def _log_probabilities(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """`[rows, T - 1, vocabulary]` for all tokens but the first."""
    with evaluating(model), gathered_parameters(model):
        logits = model(input_ids=input_ids, use_cache=False).logits
    return logits[:, :-1].float().log_softmax(-1)


def _loss(log_probabilities: torch.Tensor, input_ids: torch.Tensor) -> float:
    return F.nll_loss(log_probabilities.flatten(0, 1), input_ids[:, 1:].flatten().to(log_probabilities.device)).item()


@contextmanager
def _only_adapter(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Run one adapter, active or not, inside the block."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer._active_adapter, layer.disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = [adapter_name], False
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before):
            layer._active_adapter, layer._disable_adapters = active, disabled
