"""How a recipe starts: errors as one sentence, what identifies a run, and which model it trains."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, TrlParser

from ..config import ParScaleArguments, ParScaleConfig
from ..state import backbone_shapes
from .arguments import BackboneArguments
from .embedded import embedded_backbone


_TRAINING_IDENTITY = (
    "seed",
    "max_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "optim",
    "bf16",
    "fp16",
)


def run_recipe(main: Callable[..., None], parser: TrlParser, arguments: Sequence[str]) -> None:
    """Parse the arguments and run `main`; a wrong input ends with one sentence on stderr and exit code 1."""
    try:
        parsed = parser.parse_args_and_config(arguments)
        main(*parsed)
    except (ValueError, TypeError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def run_identity(
    recipe: str, streams: ParScaleArguments, backbone: BackboneArguments, data: Any, training: SFTConfig
) -> dict[str, Any]:
    """The settings that decide a run's numbers, for [`parscale_adapt.training.RunFolder`]."""
    sources = [source.path for source in data.sources()] or ["standard library"]
    return {
        "recipe": recipe,
        "streams": dataclasses.asdict(streams),
        "backbone": backbone.model_name_or_path or "embedded",
        "adapter": backbone.adapter_name_or_path,
        "dtype": backbone.dtype,
        "load_in_4bit": backbone.load_in_4bit,
        "data": sources,
        "data_settings": dataclasses.asdict(data),
        "world_size": training.world_size,
        **{name: getattr(training, name) for name in _TRAINING_IDENTITY},
    }


def backbone_path(backbone: BackboneArguments) -> str:
    """Name or folder of the backbone; the embedded one is pretrained on first use."""
    return backbone.model_name_or_path or str(embedded_backbone(backbone.embedded_dir))


def trainable_model(
    path: str, backbone: BackboneArguments, streams: ParScaleArguments
) -> tuple[str | PeftModel, ParScaleConfig | None]:
    """What to hand to a TRL trainer as `model` and `peft_config`: new streams, or those of a trained adapter.

    Raises:
        ValueError: stream settings were given that the adapter does not have.
    """
    adapter = backbone.adapter_name_or_path
    if adapter is None:
        return path, ParScaleConfig(task_type="CAUSAL_LM", **dataclasses.asdict(streams))
    config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, ParScaleConfig):
        raise ValueError(f"{adapter} holds a {config.peft_type} adapter, not a ParScale one.")
    _take_streams_from(config, streams, adapter)
    model = AutoModelForCausalLM.from_pretrained(
        path, **backbone.model_init_kwargs(), quantization_config=backbone.quantization_config()
    )
    carries_backbone = config.train_backbone
    config.train_backbone = carries_backbone or streams.train_backbone
    model = PeftModel.from_pretrained(model, adapter, config=config, is_trainable=True)
    trained = backbone_shapes(model)
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(streams.train_backbone)
    return model, None


def _take_streams_from(config: ParScaleConfig, streams: ParScaleArguments, adapter: str) -> None:
    """Let `streams` say what the adapter is; complain about settings that were given and differ."""
    for field in dataclasses.fields(ParScaleArguments):
        if field.name in ("train_backbone", "init_weights", "init_std"):
            continue
        given, stored = getattr(streams, field.name), getattr(config, field.name)
        if given not in (field.default, stored):
            raise ValueError(
                f"`{field.name}` is {given!r} but the adapter {adapter} was trained with {stored!r}; leave it out."
            )
        setattr(streams, field.name, stored)
