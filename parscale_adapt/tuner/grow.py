"""More streams from a trained adapter: every stream becomes several, which start out (nearly) as copies of it."""

import copy
import math

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from ..core.transforms import STREAM_TENSORS
from .config import ParScaleConfig
from .model import ParScaleModel
from .registration import PARAMETER_PREFIX
from .state import backbone_shapes


def grow_streams(model: PeftModel, source: str, target: str, num_streams: int, perturbation: float = 0.01) -> None:
    """Add an adapter `target` with `num_streams` streams that starts with what `source` does.

    Stream `c * P + p` of the new adapter is the c-th copy of stream p of the old one. The aggregator is widened so that
    the copies of a stream share its weight. All else (shared LoRA, `modules_to_save`) is copied. As after
    [`peft.PeftModel.add_adapter`], the active adapter stays active; but an adapter with `train_backbone=True` hands its
    backbone over: `source` is deleted and `target` active.

    Args:
        model: holds the trained adapter.
        source, target: names of the old and of the new adapter.
        num_streams: a multiple of the number of streams of `source`.
        perturbation: standard deviation of the noise on prefixes, low-rank weights and biases of all copies but
            the first, relative to the root mean square of each tensor. With 0 the new adapter computes exactly the
            same, but copies stay copies in training.

    Raises:
        TypeError: `model` holds no ParScale adapters.
        ValueError: a name is unknown or taken, or a number doesn't fit.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, ParScaleModel):
        raise TypeError(f"`model` must be a PeftModel with ParScale adapters, got {type(model).__name__}.")
    config = _grown_config(model, source, target, num_streams)
    if not 0 <= perturbation < math.inf:
        raise ValueError(f"`perturbation` must be a number of at least 0, got {perturbation!r}.")
    old_num_streams = model.peft_config[source].num_streams
    tensors = get_peft_model_state_dict(model, adapter_name=source, save_embedding_layers=False)
    grown = {
        name: _grow_tensor(name, tensor.detach(), old_num_streams, num_streams // old_num_streams, perturbation)
        for name, tensor in tensors.items()
    }
    if config.train_backbone:
        model.delete_adapter(source)
    model.add_adapter(target, config)
    set_peft_model_state_dict(model, grown, adapter_name=target)
    if config.train_backbone:
        model.set_adapter(target)
        trained = backbone_shapes(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name in trained)


def _grown_config(model: PeftModel, source: str, target: str, num_streams: int) -> ParScaleConfig:
    if source not in model.peft_config:
        raise ValueError(f"`source` must name a loaded adapter, {sorted(model.peft_config)}, got {source!r}.")
    if target in model.peft_config:
        raise ValueError(f"`target` must be a new name, got {target!r}, which is an adapter already.")
    config = copy.deepcopy(model.peft_config[source])
    if config.num_streams == 1:
        raise ValueError(
            f"Adapter {source!r} has one stream, which is the backbone itself and can't be duplicated: add a new adapter "
            f"with `num_streams={num_streams}`."
        )
    if type(num_streams) is not int or num_streams <= config.num_streams or num_streams % config.num_streams:
        raise ValueError(
            f"`num_streams` must be a multiple of the {config.num_streams} streams of {source!r}, at least "
            f"{2 * config.num_streams}, got {num_streams!r}."
        )
    config.num_streams = num_streams
    config.inference_mode = False
    config.is_being_loaded = True  # its tensors are given, as those in a file
    return config


def _grow_tensor(
    name: str, tensor: torch.Tensor, num_streams: int, num_copies: int, perturbation: float
) -> torch.Tensor:
    """One tensor of `num_streams` streams, by its name in a file, for `num_copies` times as many."""
    _, mark, kind = name.rpartition(f".{PARAMETER_PREFIX}")
    if not mark or kind == "aggregator.0.bias":
        return tensor
    if kind == "aggregator.0.weight":  # its inputs are `h * P + p`
        by_stream = tensor.view(tensor.shape[0], -1, num_streams)
        return by_stream.repeat(1, 1, num_copies).flatten(1) / num_copies
    grown = tensor.repeat(num_copies, *[1] * (tensor.dim() - 1))
    if kind in STREAM_TENSORS:
        size = tensor.float().square().mean().sqrt().item()
        grown[num_streams:] += torch.randn_like(grown[num_streams:]) * (perturbation * size)
    return grown
