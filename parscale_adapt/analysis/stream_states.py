"""The streams of an adapter before they are mixed: hidden states, weights, and what each state predicts.

Everything is read by hooks, the model's own code does the work. Shapes: `P` streams, `B` batch, `T` tokens, `N` tokens
that have a target, `H` hidden size, `V` vocabulary, `S` states per token.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..core.aggregator import Aggregator
from ..hf.backbone import find_decoder
from ..hf.stream_call import STREAMS_ATTRIBUTE
from ..tuner.layer import DecoderStreams, ParScaleLayer


IGNORED_LABEL = -100
LayerObserver = Callable[[str, torch.Tensor], None]


@dataclass(frozen=True)
class TokenStates:
    """The states at the `N` tokens of a batch that have a target.

    Attributes:
        hidden: `[P, N, H]` final hidden states of every stream, the aggregator's input.
        mixture: `[N, H]` the aggregator's output.
        weights: `[N, P]` the aggregator's weights.
        targets: `[N]` the next tokens.
    """

    hidden: torch.Tensor
    mixture: torch.Tensor
    weights: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class StreamedModel:
    """A causal LM with an active ParScale adapter of at least two streams; made by [`find_streams`]."""

    model: PreTrainedModel
    decoder: PreTrainedModel
    aggregator: Aggregator

    @property
    def num_streams(self) -> int:
        """P."""
        return self.aggregator.num_streams

    def token_states(self, batch: Mapping[str, Any], observe_layer: LayerObserver | None = None) -> TokenStates:
        """Run the decoder over one batch with `labels` (and without the LM head).

        `observe_layer` is called for every layer of the decoder with its name and `[P, N, H]` hidden states.
        """
        labels = batch["labels"]
        has_target = labels[:, 1:] != IGNORED_LABEL
        captured: dict[str, Any] = {}

        def select(states: torch.Tensor) -> torch.Tensor:
            by_stream = states.unflatten(0, (-1, labels.shape[0]))[:, :, :-1]
            return by_stream[:, has_target.to(states.device)]

        def capture(module: Aggregator, args: tuple, output: torch.Tensor) -> None:
            captured.update(hidden=select(args[0]), mixture=select(output)[0], weights=module.last_weights)

        inputs = {name: value for name, value in batch.items() if name != "labels"}
        device = self.model.get_input_embeddings().weight.device
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        hooks = {self.aggregator: capture, **self._layer_hooks(observe_layer, select)}
        with _recorded_weights(self.aggregator), _hooked(hooks):
            self.decoder(**{**inputs, "use_cache": False})
        weights = captured["weights"][:, :-1][has_target.to(captured["weights"].device)]
        targets = labels[:, 1:][has_target].to(weights.device)
        return TokenStates(captured["hidden"], captured["mixture"], weights, targets)

    def _layer_hooks(
        self, observe: LayerObserver | None, select: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[nn.Module, Callable]:
        if observe is None:
            return {}

        def hook(name: str) -> Callable:
            return lambda module, args, output: observe(name, select(output if torch.is_tensor(output) else output[0]))

        return {layer: hook(name) for name, layer in find_layers(self.decoder).items()}

    def log_probs(self, states: torch.Tensor, targets: torch.Tensor, max_logits: int) -> torch.Tensor:
        """Log-probability of every target under every state: `[S, N, H]` and `[N]` to `[S, N]`, double, on the CPU.

        At most `max_logits` logits exist at a time (but those of one token always do).
        """
        flat_targets = targets.repeat(states.shape[0])

        def read(logits: torch.Tensor, places: slice) -> torch.Tensor:
            chosen = flat_targets[places, None].to(logits.device)
            return (logits.gather(-1, chosen)[:, 0] - logits.logsumexp(-1)).cpu().double()

        return torch.cat(self._in_chunks(states, max_logits, read)).view(states.shape[:2])

    def most_likely(self, states: torch.Tensor, max_logits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The most likely token under every state: `[S, N, H]` to tokens `[S, N]` and their log-probabilities, double, on
        the CPU; `max_logits` as in [`log_probs`].
        """

        def read(logits: torch.Tensor, places: slice) -> tuple[torch.Tensor, torch.Tensor]:
            best = logits.max(-1)
            return best.indices.cpu(), (best.values - logits.logsumexp(-1)).cpu().double()

        tokens, log_probs = zip(*self._in_chunks(states, max_logits, read))
        return torch.cat(tokens).view(states.shape[:2]), torch.cat(log_probs).view(states.shape[:2])

    def _in_chunks(
        self, states: torch.Tensor, max_logits: int, read: Callable[[torch.Tensor, slice], Any]
    ) -> list[Any]:
        """What `read` gives for the logits `[C, V]` of a few states after the other, and where among all they are."""
        flat = states.flatten(0, 1)
        num_tokens = max(1, max_logits // self.model.config.get_text_config().vocab_size)
        places = [slice(start, start + num_tokens) for start in range(0, flat.shape[0], num_tokens)]
        return [read(self._logits(flat[place]).float(), place) for place in places]

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        """`[C, H]` final hidden states to `[C, V]` logits, through everything that the model does after its decoder.

        The decoder runs on a single token, and the states take the place of its output.
        """
        token = torch.zeros(1, 1, dtype=torch.long, device=self.model.get_input_embeddings().weight.device)
        with _hooked({self.aggregator: lambda module, args, output: states[None]}):
            return self.model(input_ids=token, use_cache=False).logits[0]


def find_streams(model: PeftModel | PreTrainedModel) -> StreamedModel:
    """The decoder and the active aggregator of a model, or those of a checkpoint that owns its streams.

    Raises:
        TypeError: `model` is neither.
        ValueError: its active adapter is not a ParScale adapter, has one stream, or is disabled.
    """
    owned = None if isinstance(model, PeftModel) else _owned_streams(model)
    if owned is not None:
        return owned
    if not isinstance(model, PeftModel):
        raise TypeError(f"`model` must be a PeftModel with a ParScale adapter, got {type(model).__name__}.")
    config = model.active_peft_config
    num_streams = getattr(config, "num_streams", None)
    if num_streams is None:
        raise ValueError(f"the active adapter is not a ParScale adapter, its type is {config.peft_type}.")
    if num_streams == 1:
        raise ValueError("the adapter has one stream, so there is nothing to compare: diagnose needs P of at least 2.")
    base = model.get_base_model()
    decoder = base.get_submodule(find_decoder(base))
    streams: DecoderStreams = getattr(decoder, STREAMS_ATTRIBUTE)
    if streams.current_adapter is None:
        raise ValueError("the adapter is disabled: call `diagnose` outside `disable_adapter()`.")
    return StreamedModel(base, decoder, streams.parscale_aggregator[streams.current_adapter])


def _owned_streams(model: object) -> StreamedModel | None:
    """Those of a checkpoint, whose classes may come from the code in its own folder."""
    for decoder in model.modules() if isinstance(model, PreTrainedModel) else ():
        aggregator = getattr(getattr(decoder, STREAMS_ATTRIBUTE, None), "aggregator", None)
        if aggregator is not None:
            return StreamedModel(model, decoder, aggregator)
    return None


def find_layers(decoder: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a decoder by name: the members of every outermost module list that holds streams."""
    layers: dict[str, nn.Module] = {}
    for name, module in decoder.named_modules():
        is_inside = any(name.startswith(f"{layer}.") for layer in layers)
        if isinstance(module, nn.ModuleList) and not is_inside and _holds_streams(module):
            layers |= {f"{name}.{index}": layer for index, layer in enumerate(module)}
    return layers


def _holds_streams(module: nn.Module) -> bool:
    return any(isinstance(getattr(part, STREAMS_ATTRIBUTE, None), ParScaleLayer) for part in module.modules())


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _recorded_weights(aggregator: Aggregator) -> Iterator[None]:
    before = aggregator.record_weights, aggregator.last_weights
    aggregator.record_weights = True
    try:
        yield
    finally:
        aggregator.record_weights, aggregator.last_weights = before
