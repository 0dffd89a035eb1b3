"""What a backbone or an adapter must not be when the two are put together; checked before anything is changed."""

import warnings
from collections.abc import Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel

from ..hf.backbone import find_decoder
from ..hf.fingerprint import describe_difference
from ..hf.stream_call import STREAMS_ATTRIBUTE
from .config import ParScaleConfig
from .layer import ParScaleLayer


def refuse_second_tuner(model: nn.Module) -> None:
    """Raises ValueError where the model holds the streams of another PEFT model."""
    if any(isinstance(module, ParScaleLayer) for module in model.modules()):
        raise ValueError(
            "The backbone already holds streams of another adapter: add adapters by `add_adapter` of that one's PEFT "
            "model, or call its `unload()` first."
        )


def refuse_loading_by_transformers(peft_config: object) -> None:
    """Raises ValueError where transformers' own `load_adapter`, which hands over a bare configuration and not a
    dictionary of them, would leave the adapter's tensors as they were drawn."""
    if isinstance(peft_config, ParScaleConfig) and peft_config.describes_saved_adapter:
        raise ValueError(
            "transformers itself can't load a saved ParScale adapter, since it doesn't know its tensors by their names: "
            "load it with `PeftModel.from_pretrained` or `AutoPeftModelForCausalLM.from_pretrained`."
        )


def refuse_streams_of_its_own(model: PreTrainedModel) -> None:
    """Raises ValueError where the model is a checkpoint with streams, and what [`find_decoder`] raises."""
    if hasattr(model.get_submodule(find_decoder(model)), STREAMS_ATTRIBUTE):
        raise ValueError(
            f"{type(model).__name__} already runs in streams of its own: put adapters on its plain backbone "
            "(`parscale import` makes an adapter of its streams)."
        )


def refuse_shared_ownership(configs: Mapping[str, ParScaleConfig]) -> None:
    """Raises ValueError where an adapter with `train_backbone=True` is not alone."""
    owners = [name for name, config in configs.items() if config.train_backbone]
    if owners and len(configs) > 1:
        raise ValueError(
            f"Adapter {owners[0]!r} has `train_backbone=True` and so owns the backbone; it can't share it with "
            f"{sorted(set(configs) - {owners[0]})}. Load it on a backbone of its own."
        )


def refuse_training_quantized_backbone(model: PreTrainedModel, config: ParScaleConfig) -> None:
    """Raises ValueError where a quantized backbone is to be trained."""
    if config.train_backbone and getattr(model, "is_quantized", False):
        raise ValueError(
            "`train_backbone=True` needs a backbone in full precision, got a quantized one: train with "
            "`train_backbone=False`, or load the backbone without quantization."
        )


def refuse_copied_hosts(config: ParScaleConfig, projections: Iterable[str]) -> None:
    """Raises ValueError where `modules_to_save`, of which PEFT trains copies, holds linear layers of the streams."""
    for wanted in config.modules_to_save or ():
        for name in projections:
            if f".{wanted}." in f".{name}.":
                raise ValueError(
                    f"`modules_to_save` names {wanted!r}, but the linear layer `{name}` in it holds what the streams "
                    f"of `stream_transform={config.stream_transform!r}` differ by: leave it out."
                )


def refuse_unusable_name(name: str) -> None:
    """Raises ValueError for what module dictionaries, in which PEFT keeps adapters, or its wrappers can't take."""
    if not name or "." in name or hasattr(nn.ModuleDict, name) or name == "base_layer":
        raise ValueError(f"An adapter can't be named {name!r}: take a name without dots, such as 'default'.")


def check_fingerprint(config: ParScaleConfig, found: dict[str, str], model_name: str) -> None:
    """Note the backbone's fingerprint in a new configuration, or compare it with that of a saved one.

    Raises:
        ValueError: the adapter was trained on another backbone; a warning with `verify_backbone=False`.
    """
    if config.backbone_fingerprint is None or not config.describes_saved_adapter:
        config.backbone_fingerprint = found
        return
    difference = describe_difference(config.backbone_fingerprint, found)
    if difference is None:
        return
    message = f"The adapter was trained on another backbone than this {model_name}: {difference}."
    if config.verify_backbone:
        raise ValueError(
            f"{message} Load the backbone that it was trained on, or pass `verify_backbone=False` if you know that they "
            "fit."
        )
    warnings.warn(f"{message} Going on because of `verify_backbone=False`.", stacklevel=2)
