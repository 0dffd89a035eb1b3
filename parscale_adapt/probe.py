"""What a backbone looks like from inside its attention calls; read off one small forward, not guessed from configs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from .decoder import refuse_unsupported_attention
from .observer import observe_attention


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
    """One forward of a decoder: what its attention modules saw, by module name, and the size of its output."""

    states: dict[str, ObservedStates]
    hidden_size: int


@dataclass
class Backbone:
    """The decoder of a causal LM and the attention modules in which a prefix can live, by module name.

    `attention_shapes` is empty where no attention can be reached.
    """

    decoder_name: str
    hidden_size: int
    attention_shapes: dict[str, AttentionShape]


def find_decoder(model: nn.Module) -> str:
    """The name of the decoder inside a causal LM.

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: it is not a decoder-only causal LM.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a transformers causal LM, got {type(model).__name__}.")
    class_name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{class_name} is an encoder-decoder model; streams need a decoder-only causal LM such as "
            "Qwen2ForCausalLM."
        )
    if model.get_output_embeddings() is None or not model.can_generate():
        raise ValueError(
            f"{class_name} is not a causal LM with an LM head: load the backbone with `AutoModelForCausalLM`."
        )
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):  # ModernBERT calls its LM head `decoder`
        decoder = model.base_model
    if decoder is model:
        raise ValueError(
            f"{class_name} has no decoder module apart from its LM head, so its hidden states can't be mixed."
        )
    return next(name for name, module in model.named_modules() if module is decoder)


def probe_backbone(model: PreTrainedModel) -> Backbone:
    """Find the decoder and every attention module of `model` by running one token through it.

    Raises:
        TypeError, ValueError: as in [`find_decoder`]; ValueError also where attention picks single keys.
    """
    decoder_name = find_decoder(model)
    refuse_unsupported_attention(model.get_submodule(decoder_name))
    observed = observe_states(model, torch.zeros(1, 1, dtype=torch.long))
    shapes = {
        name: AttentionShape(states.key.shape[1], states.key.shape[-1], states.value.shape[-1])
        for name, states in observed.states.items()
    }
    return Backbone(decoder_name, observed.hidden_size, shapes)


@torch.no_grad()
def observe_states(
    model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None
) -> Observation:
    """Run `input_ids` `[rows, T]` through the decoder and look at its attention calls."""
    names = {module: name for name, module in model.named_modules()}
    states: dict[str, ObservedStates] = {}

    def record(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        states[names[module]] = ObservedStates(key, value)

    device = model.get_input_embeddings().weight.device
    positions = {} if position_ids is None else {"position_ids": position_ids.to(device)}
    with evaluating(model), gathered_parameters(model), observe_attention(model, record):
        output = model.get_submodule(find_decoder(model))(input_ids=input_ids.to(device), use_cache=False, **positions)
    return Observation(states, output[0].shape[-1])


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


@contextmanager
def gathered_parameters(model: nn.Module) -> Iterator[None]:
    """Gather DeepSpeed ZeRO-3 partitions module by module, so that a forward works before the engine exists."""
    if not any(is_partitioned(parameter) for parameter in model.parameters()):
        yield
        return
    import deepspeed

    contexts: dict[nn.Module, ExitStack] = {}

    def gather(module: nn.Module, args: tuple) -> None:
        contexts[module] = ExitStack()
        parameters = list(module.parameters(recurse=False))
        contexts[module].enter_context(deepspeed.zero.GatheredParameters(parameters))

    def release(module: nn.Module, args: tuple, output: object) -> None:
        contexts.pop(module).close()

    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    with ExitStack() as stack:
        for module in owners:
            stack.callback(module.register_forward_pre_hook(gather).remove)
            stack.callback(module.register_forward_hook(release, always_call=True).remove)
        yield


@contextmanager
def gathered(parameters: list[nn.Parameter], writer: int | None = None) -> Iterator[None]:
    """Hold the full values of parameters that DeepSpeed ZeRO-3 partitions; every rank must enter.

    What the block writes into them is lost, unless `writer` names the rank whose values all ranks take over.
    """
    if not any(is_partitioned(parameter) for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=writer):
        yield


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed ZeRO-3 holds only a share of `parameter` here."""
    return hasattr(parameter, "ds_id")
