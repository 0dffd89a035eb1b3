"""What a backbone looks like from inside its attention calls; read off one small forward, not guessed from configs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, cache_utils

from .config_view import stock_config
from .decoder import refuse_unsupported_attention
from .engines import execution_device, gathered_parameters, refuse_absent_weights
from .observer import AttentionObserver, observe_attention
from .prefixed_attention import AttentionInputs


_NO_DECODER = "{} has no decoder module apart from its head, so its hidden states can't be mixed."


class AttentionShape(NamedTuple):
    """Sizes of the keys and values that one attention module hands to the attention function."""

    num_key_value_heads: int
    key_size: int
    value_size: int


@dataclass
class ObservedStates:
    """Keys `[rows, heads, T, key_size]` and values `[rows, heads, T, value_size]` of one attention module."""

    key: torch.Tensor
    value: torch.Tensor


@dataclass
class Observation:
    """One forward of a decoder: what its attention modules saw, by module name, and the size of its output.

    `output_module` names the last module with weights of its own that ran.
    """

    states: dict[str, ObservedStates]
    hidden_size: int
    output_module: str


@dataclass
class Backbone:
    """A model with a decoder, as streams see it.

    Args:
        decoder_name: the module whose output is aggregated.
        hidden_size: of that output.
        output_module: where that output was computed last; a backbone may be spread over several devices.
        attention_shapes: the attention modules in which a prefix can live, by module name; empty where none can be
            reached.
        attended_layers: layers of the cache whose attention functions get just what `Cache.update` returns.
        masks_per_row: whether the architecture computes with its masks before attention, and so needs one per row.
    """

    decoder_name: str
    hidden_size: int
    output_module: str
    attention_shapes: dict[str, AttentionShape]
    attended_layers: frozenset[int] = frozenset()
    masks_per_row: bool = False


def find_decoder(model: nn.Module) -> str:
    """The name of the decoder inside a causal LM, a model with another head, or a decoder alone, which is `""`.

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: it has an encoder, reads no tokens of one vocabulary, or its decoder can't be told from its head.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a transformers model, got {type(model).__name__}.")
    class_name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{class_name} is an encoder-decoder model; streams need a decoder-only model such as Qwen2ForCausalLM."
        )
    has_lm_head = model.get_output_embeddings() is not None
    if has_lm_head and not model.can_generate():
        raise ValueError(
            f"{class_name} is not a causal LM, though it has an LM head: load the backbone with `AutoModelForCausalLM`."
        )
    embedding = _token_embedding(model)
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(
            f"{class_name} reads its tokens from {type(embedding).__name__} and not from one embedding: streams need a "
            "language model over one vocabulary."
        )
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):  # ModernBERT calls its LM head `decoder`
        decoder = model.base_model
    if decoder is model:  # Llama 4 names a prefix that is no attribute
        inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
        decoder = inner[0] if len(inner) == 1 else model
    if decoder is model and has_lm_head:
        raise ValueError(_NO_DECODER.format(class_name))
    return next(name for name, module in model.named_modules() if module is decoder)


def _token_embedding(model: PreTrainedModel) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _refuse_encoder(model: PreTrainedModel) -> None:
    """Raises ValueError where later tokens change earlier states, as in BERT, a state is pooled inside the decoder, where
    there is one per stream, or there is no decoder at all."""
    decoder = model.get_submodule(find_decoder(model))
    rows = torch.tensor([[0, 0, 0], [0, 0, 1]], device=input_device(model))
    with torch.no_grad(), evaluating(model), gathered_parameters(model):
        output = decoder(input_ids=rows, use_cache=False)
    if "last_hidden_state" not in output:
        raise ValueError(_NO_DECODER.format(type(model).__name__))
    first, second = output["last_hidden_state"][:, :2].float()
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3) or output.get("pooler_output") is not None:
        raise ValueError(
            f"{type(model).__name__} is an encoder, in which tokens see later ones: streams need a decoder, such as "
            "that of Qwen2ForSequenceClassification."
        )


def probe_backbone(model: PreTrainedModel) -> Backbone:
    """Find the decoder and every attention module of `model` by running one token through it.

    Raises:
        TypeError, ValueError: as in [`find_decoder`]; ValueError also where weights are missing, where attention picks
            single keys, or where a cache holds what streams can't lay out.
    """
    decoder_name = find_decoder(model)
    refuse_absent_weights(model)
    refuse_unsupported_attention(model.get_submodule(decoder_name))
    if model.get_output_embeddings() is None:
        _refuse_encoder(model)
    observed = observe_states(model, torch.zeros(1, 1, dtype=torch.long))
    shapes = {
        name: AttentionShape(states.key.shape[1], states.key.shape[-1], states.value.shape[-1])
        for name, states in observed.states.items()
    }
    attended_layers, masks_per_row = _observe_routes(model) if shapes else (frozenset(), False)
    return Backbone(decoder_name, observed.hidden_size, observed.output_module, shapes, attended_layers, masks_per_row)


class _StateObserver(AttentionObserver):
    """Keeps the keys and values of every attention module, by its name."""

    def __init__(self, model: nn.Module):
        self.names = {module: name for name, module in model.named_modules()}
        self.states: dict[str, ObservedStates] = {}

    def see_attention(self, call: AttentionInputs, implementation: str) -> None:
        self.states[self.names[call.module]] = ObservedStates(call.key, call.value)


class _RecordingCache(DynamicCache):
    """A cache that remembers what its updates returned, by layer."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self.returned: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.returned[layer_idx] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return self.returned[layer_idx]


def _empty_cache(model: nn.Module, config: PreTrainedConfig) -> _RecordingCache:
    name = type(model).__name__
    if getattr(config.get_text_config(decoder=True), "num_hidden_layers", None) is None:
        raise ValueError(
            f"{name} is made of several models with caches of their own, in which streams can't be laid out."
        )
    cache = _RecordingCache(config)
    for layer in cache.layers:
        if type(layer).__module__ != cache_utils.__name__ or isinstance(layer, cache_utils.DynamicIndexedLayer):
            raise ValueError(
                f"{name} keeps states of its own in its cache ({type(layer).__name__}), in which streams can't be laid "
                "out."
            )
    return cache


class _RouteObserver(AttentionObserver):
    """Follows masks from where they are made, and keys and values from the cache, to attention."""

    def __init__(self, cache: _RecordingCache):
        self.cache = cache
        self.masks: list[torch.Tensor] = []
        self.attended_layers: set[int] = set()
        self.masks_per_row = False

    def see_mask(self, mask: Any) -> None:
        if isinstance(mask, torch.Tensor):
            self.masks.append(mask)

    def see_attention(self, call: AttentionInputs, implementation: str) -> None:
        mask = call.mask
        for layer, (cached_key, cached_value) in self.cache.returned.items():
            if _is_same(call.key, cached_key) and _is_same(call.value, cached_value):
                self.attended_layers.add(layer)
        if isinstance(mask, torch.Tensor) and not any(_is_same(mask, made) for made in self.masks):
            self.masks_per_row = True


def _is_same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.data_ptr() == other.data_ptr() and tensor.shape[:2] == other.shape[:2]


@torch.no_grad()
def _observe_routes(model: PreTrainedModel) -> tuple[frozenset[int], bool]:
    """Run a left-padded batch with a cache through the decoder.

    Returns:
        `attended_layers` and `masks_per_row` of [`Backbone`].
    """
    decoder = model.get_submodule(find_decoder(model))
    cache = _empty_cache(model, stock_config(decoder.config))
    observer = _RouteObserver(cache)
    device = input_device(model)
    input_ids, attention_mask = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[0, 1, 1], [1, 1, 1]])
    inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
    with evaluating(model), gathered_parameters(model), observe_attention(model, observer):
        own_cache = decoder(**inputs, use_cache=True).get("past_key_values")
        if own_cache is not None and type(own_cache).__module__ != cache_utils.__name__:
            raise ValueError(
                f"{type(model).__name__} makes a cache of its own ({type(own_cache).__name__}), in which streams can't be "
                "laid out."
            )
        decoder(**inputs, past_key_values=cache, use_cache=True)
    # Where masks are reworked row by row, what comes from the cache may be as well.
    attended_layers = frozenset() if observer.masks_per_row else frozenset(observer.attended_layers)
    return attended_layers, observer.masks_per_row


@torch.no_grad()
def observe_states(
    model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None
) -> Observation:
    """Run `input_ids` `[rows, T]` through the decoder and look at its attention calls."""
    observer, decoder = _StateObserver(model), model.get_submodule(find_decoder(model))
    device = input_device(model)
    positions = {} if position_ids is None else {"position_ids": position_ids.to(device)}
    with evaluating(model), gathered_parameters(model), observe_attention(model, observer), _running(decoder) as ran:
        output = decoder(input_ids=input_ids.to(device), use_cache=False, **positions)
    return Observation(observer.states, output[0].shape[-1], observer.names[ran[-1]])


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids have to be."""
    return execution_device(model.get_input_embeddings())


@contextmanager
def _running(decoder: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules inside a decoder that have weights of their own, in the order in which they run inside the block."""
    ran: list[nn.Module] = []
    with ExitStack() as stack:
        for module in decoder.modules():
            if module is not decoder and next(module.parameters(recurse=False), None) is not None:
                hook = module.register_forward_hook(lambda module, *_: ran.append(module))
                stack.callback(hook.remove)
        yield ran


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode inside the block, and each back into its own mode after it."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training
