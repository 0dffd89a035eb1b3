"""The linear layers of a decoder through which streams run as rows; read off one small forward."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .backbone import evaluating, find_decoder, input_device
from .engines import gathered_parameters


_NUM_ROWS, _NUM_TOKENS = 3, 5


class ProjectionShape(NamedTuple):
    """Sizes of the input and output of one linear layer."""

    in_features: int
    out_features: int


def observe_projections(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> dict[str, ProjectionShape]:
    """Run a few tokens through the decoder and look which linear layers see them as `[rows, T, features]`.

    A layer that sees chosen tokens only (experts), or whose weight is read without calling it, in evaluation or in
    training, can't tell streams apart and is left out; so is the LM head, which stands outside of the decoder.

    Args:
        model: the causal LM.
        modules: the backbone's own modules by name; those that aren't linear layers are skipped.

    Raises:
        ValueError: no linear layer is left.
    """
    linears = {name: module for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D))}
    with evaluating(model), gathered_parameters(model):
        shapes = _observe(model, linears)
        with _training(modules):  # some fused kernels are used in training only
            in_training = _observe(model, linears)
    shapes = {name: shape for name, shape in shapes.items() if in_training.get(name) == shape}
    if not shapes:
        raise ValueError(
            f"{type(model).__name__} has no linear layer through which streams run as rows, so there is nowhere to put "
            "a LoRA or a bias per stream."
        )
    return shapes


@torch.no_grad()
def _observe(model: PreTrainedModel, linears: Mapping[str, nn.Module]) -> dict[str, ProjectionShape]:
    shapes: dict[str, ProjectionShape] = {}
    refused: set[str] = set()

    def record(name: str, inputs: torch.Tensor, output: torch.Tensor) -> None:
        if inputs.shape[:-1] != (_NUM_ROWS, _NUM_TOKENS):
            refused.add(name)
        shapes[name] = ProjectionShape(inputs.shape[-1], output.shape[-1])

    input_ids = torch.arange(_NUM_ROWS * _NUM_TOKENS, device=input_device(model))
    input_ids = input_ids.view(_NUM_ROWS, _NUM_TOKENS) % model.config.get_text_config().vocab_size
    with ExitStack() as stack:
        for name, module in linears.items():
            hook = module.register_forward_hook(lambda module, args, output, name=name: record(name, args[0], output))
            stack.callback(hook.remove)
        model.get_submodule(find_decoder(model))(input_ids=input_ids, use_cache=False)
    return {name: shape for name, shape in shapes.items() if name not in refused}


@contextmanager
def _training(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules into training mode; [`evaluating`] around it gives them their own modes back."""
    for module in modules.values():
        module.training = True
    yield
