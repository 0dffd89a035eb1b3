"""What a backbone looks like from inside its attention calls; read off one small forward, not guessed from configs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from .attention import observe_attention, route_through_streams


@dataclass
class AttentionShape:
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
class Backbone:
    """A causal LM, its decoder and the attention modules in which a prefix can live."""

    model: PreTrainedModel
    decoder: PreTrainedModel
    decoder_name: str
    hidden_size: int
    attention_shapes: dict[str, AttentionShape] = field(default_factory=dict)


def probe_backbone(model: nn.Module) -> Backbone:
    """Find the decoder and every attention module of `model` by running one token through it.

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: it is not a decoder-only causal LM, or no attention of it can be reached.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a transformers causal LM, got {type(model).__name__}.")
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder model; streams need a decoder-only causal LM such as Qwen2ForCausalLM."
        )
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{name} has no LM head; streams need a causal LM: load the backbone with `AutoModelForCausalLM`."
        )
    decoder = model.get_decoder()
    decoder_name = next(key for key, module in model.named_modules() if module is decoder)
    if decoder_name == "":
        raise ValueError(f"{name} has no decoder module apart from its LM head, so its hidden states can't be mixed.")
    hidden_size = model.config.get_text_config().hidden_size
    backbone = Backbone(model, decoder, decoder_name, hidden_size)
    observed = observe_states(model, torch.zeros(1, 1, dtype=torch.long))
    if not observed:
        raise ValueError(
            f"{name} has no attention that streams can reach: none of its layers calls transformers' attention "
            "interface, so there is nowhere to put a prefix."
        )
    for module_name, states in observed.items():
        backbone.attention_shapes[module_name] = AttentionShape(
            states.key.shape[1], states.key.shape[-1], states.value.shape[-1]
        )
    return backbone


@torch.no_grad()
def observe_states(
    model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None
) -> dict[str, ObservedStates]:
    """Keys and values of every attention module, by module name, for `input_ids` `[rows, T]`."""
    names = {module: name for name, module in model.named_modules()}
    observed: dict[str, ObservedStates] = {}

    def record(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        observed[names[module]] = ObservedStates(key, value)

    route_through_streams(model)
    device = model.get_input_embeddings().weight.device
    positions = {} if position_ids is None else {"position_ids": position_ids.to(device)}
    with _evaluating(model), _gathered_parameters(model), observe_attention(record):
        model.get_decoder()(input_ids=input_ids.to(device), use_cache=False, **positions)
    return observed


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


@contextmanager
def _gathered_parameters(model: nn.Module) -> Iterator[None]:
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


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed ZeRO-3 holds only a share of `parameter` here."""
    return hasattr(parameter, "ds_id")
