"""A backbone and its streams as one transformers model, whose checkpoints load without this package."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..core.transforms import ATTENTION, STREAM_TENSORS, named_transforms
from ..hf.backbone import Backbone
from ..hf.stream_call import STREAMS_ATTRIBUTE
from ..version import __version__
from .bundle import CODE_FILE, ClassNames, joined_code
from .streamed import StreamedCausalLM, StreamedModel, inherit_weight_names


STREAM_FIELDS = (
    "num_streams",
    "stream_transform",
    "num_prefix_tokens",
    "stream_lora_rank",
    "stream_lora_alpha",
    "aggregator",
    "aggregator_smoothing",
)


class StandaloneClasses(NamedTuple):
    """Classes of a model that owns its streams."""

    config: type[PreTrainedConfig]
    model: type[StreamedModel]
    causal_lm: type[StreamedCausalLM]


class _SavesItsCode(StreamedCausalLM):
    """Mixin that puts the code of a model beside its weights."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As [`transformers.PreTrainedModel.save_pretrained`]; the folder loads with `trust_remote_code=True`."""
        module, names = Path(CODE_FILE).stem, self.class_names
        self.config.auto_map = {
            "AutoConfig": f"{module}.{names.config}",
            "AutoModel": f"{module}.{names.model}",
            "AutoModelForCausalLM": f"{module}.{names.causal_lm}",
        }
        super().save_pretrained(save_directory, *args, **kwargs)
        code = joined_code(names, self.sources, self.config.parscale["version"])
        Path(save_directory, CODE_FILE).write_text(code, encoding="utf-8")


def base_model_name(model: PreTrainedModel, decoder_name: str) -> str:
    """The name in a causal LM of its base model: what transformers calls so, or else the decoder."""
    if model.base_model is model:
        return decoder_name
    return next(name for name, module in model.named_modules() if module is model.base_model)


def standalone_classes(model: PreTrainedModel, base_name: str) -> StandaloneClasses:
    """The classes that a plain causal LM takes on when it gets streams of its own.

    Args:
        model: the causal LM.
        base_name: the name in it of its base model, see [`base_model_name`].

    Raises:
        ValueError: it is quantized, has another head than a causal LM's, or its code is no part of transformers.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "A standalone checkpoint needs a backbone in full precision, got a quantized one: load the backbone without "
            "quantization, and the adapter on it."
        )
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"A standalone checkpoint is a causal LM, got {type(model).__name__} under the streams: save the adapter, and "
            "load it on its backbone."
        )
    stock: Any = (type(model.config), type(model.get_submodule(base_name)), type(model))
    return _derived_classes(*stock)


@lru_cache
def _derived_classes(
    config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel], causal_lm_class: type[PreTrainedModel]
) -> StandaloneClasses:
    """The classes that `modeling_parscale.py` defines for these classes of transformers, made in this process."""
    stock = (config_class, model_class, causal_lm_class)
    for stock_class in stock:
        if not stock_class.__module__.startswith("transformers."):
            raise ValueError(
                f"A standalone checkpoint needs a backbone whose classes are part of transformers, got "
                f"{stock_class.__module__}.{stock_class.__name__}: save the adapter, and load it on its backbone."
            )
    architecture = model_class.__name__.removesuffix("Model")
    names = ClassNames(
        model_type=f"parscale_{config_class.model_type}",
        config=f"ParScale{config_class.__name__}",
        model=f"ParScale{architecture}Model",
        causal_lm=f"ParScale{architecture}ForCausalLM",
        stock_config=config_class.__name__,
        stock_model=model_class.__name__,
        stock_causal_lm=causal_lm_class.__name__,
    )
    config: Any = type(names.config, (config_class,), {"model_type": names.model_type, "__module__": __name__})
    shared = {"config_class": config, "__module__": __name__}
    model: Any = type(names.model, (StreamedModel, model_class), dict(shared))
    fields = {"streamed_class": model, "class_names": names, "sources": {c.__name__: c.__module__ for c in stock}}
    causal_lm: Any = type(names.causal_lm, (_SavesItsCode, causal_lm_class), shared | fields)
    inherit_weight_names(config, model, causal_lm)
    return StandaloneClasses(config, model, causal_lm)


def describe_streams(
    model: PreTrainedModel,
    backbone: Backbone,
    projection_shapes: Mapping[str, Sequence[int]],
    fields: Mapping[str, Any],
) -> dict[str, Any]:
    """What `config.parscale` says; see [`parscale_adapt.models.streamed`].

    Args:
        model: the causal LM.
        backbone: its decoder and attention modules, by their names in `model`.
        projection_shapes: the linear layers in which streams differ, by their names in `model`.
        fields: of an adapter's configuration, `STREAM_FIELDS` among them.
    """
    base_name = base_model_name(model, backbone.decoder_name)
    names = {module: name for name, module in model.get_submodule(base_name).named_modules()}

    def relative(shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        return {names[model.get_submodule(name)]: list(shape) for name, shape in shapes.items()}

    streams = {name: fields[name] for name in STREAM_FIELDS}
    if not named_transforms(fields["stream_transform"], ATTENTION):
        streams["num_prefix_tokens"] = 0
    return {
        **streams,
        "base_model": base_name,
        "decoder": names[model.get_submodule(backbone.decoder_name)],
        "hidden_size": backbone.hidden_size,
        "attention_shapes": relative(backbone.attention_shapes),
        "attended_layers": sorted(backbone.attended_layers),
        "masks_per_row": backbone.masks_per_row,
        "projection_shapes": relative(projection_shapes),
        "version": __version__,
    }


def make_standalone(
    model: PreTrainedModel, streams: dict[str, Any], tensors: Mapping[str, torch.Tensor]
) -> PreTrainedModel:
    """Turn a plain causal LM into one that owns its streams. Its own parameters stay the very same tensors.

    Args:
        model: the backbone, without adapters.
        streams: as from [`describe_streams`].
        tensors: those of one adapter, by their names in an adapter file, relative to the backbone.

    Raises:
        ValueError: see [`standalone_classes`].
    """
    classes = standalone_classes(model, streams["base_model"])
    model.config.__class__ = classes.config
    model.config.parscale = streams
    model.__class__ = classes.causal_lm
    model.run_in_streams()
    # In float32, as its classes keep them.
    owned = {standalone_name(name): _at_least_float32(tensor) for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(owned, strict=False, assign=True)
    lost = [name for name in missing if f".{STREAMS_ATTRIBUTE}." in name]
    if lost or unexpected:
        raise ValueError(f"The tensors of the adapter don't fit its streams: {lost} missing, {unexpected} unexpected.")
    return model.train(model.training)


def standalone_name(name: str) -> str:
    """The name in a standalone model of a tensor in an adapter file, for example
    `model.layers.0.self_attn.parscale_prefix_k` to `model.layers.0.self_attn.parscale.prefix_k.weight`."""
    host, _, rest = name.partition(".parscale_")
    return f"{host}.parscale.{STREAM_TENSORS.get(rest, rest)}"


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
