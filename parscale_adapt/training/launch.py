"""How a recipe starts: errors as one sentence, what identifies a run, and which model it trains."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from accelerate.utils import broadcast_object_list
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, TrlParser

from ..tuner.config import ParScaleArguments, ParScaleConfig
from ..tuner.state import backbone_shapes
from .arguments import BackboneArguments
from .embedded import embedded_backbone
from .run_folder import RunFolder


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
    parser.error = _refuse
    parser.allow_abbrev = False
    try:
        parsed = parser.parse_args_and_config(arguments)
        main(*parsed)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def _refuse(message: str) -> NoReturn:
    """Instead of argparse's page of usage."""
    raise ValueError(message)


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


def open_run_folder(training: SFTConfig, identity: dict[str, Any]) -> str | None:
    """Claim the output folder on the main process, and tell every rank the checkpoint to go on from.

    Raises:
        ValueError: on every rank, as [`RunFolder.open`].
    """
    answer: list[str | None] = [None, None]
    if training.process_index == 0:
        try:
            answer[0] = RunFolder(training.output_dir, identity).open(training.resume_from_checkpoint)
        except ValueError as error:
            answer[1] = str(error)
    checkpoint, refusal = broadcast_object_list(answer)
    if refusal is not None:
        raise ValueError(refusal)
    return checkpoint


def backbone_path(backbone: BackboneArguments) -> str:
    """Name or folder of the backbone; the embedded one is pretrained on first use.

    Raises:
        ValueError: it is a path, and no folder is there.
    """
    path = backbone.model_name_or_path
    if path is None:
        return str(embedded_backbone(backbone.embedded_dir))
    if path.startswith(("/", "./", "../", "~")) and not Path(path).expanduser().is_dir():
        raise ValueError(f"`model_name_or_path` is {path}, where no folder is.")
    return path


def trainable_model(
    path: str, backbone: BackboneArguments, streams: ParScaleArguments
) -> tuple[str | PeftModel, ParScaleConfig | None]:
    """What to hand to a TRL trainer as `model` and `peft_config`: new streams, or those of a trained adapter.

    Raises:
        ValueError: the adapter is of another method, stream settings were given that it does not have, or it carries
            a backbone that can't be loaded in 4 bits.
    """
    adapter = backbone.adapter_name_or_path
    if adapter is None:
        return path, ParScaleConfig(task_type="CAUSAL_LM", **dataclasses.asdict(streams))
    config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, ParScaleConfig):
        method = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{adapter} holds a {method} adapter, not a ParScale one.")
    if config.train_backbone and backbone.load_in_4bit:
        raise ValueError(
            f"{adapter} carries a trained backbone, which 4-bit weights can't hold: leave --load_in_4bit out."
        )
    _take_streams_from(config, streams, adapter)
    model = AutoModelForCausalLM.from_pretrained(
        path, **backbone.model_init_kwargs(), quantization_config=backbone.quantization_config()
    )
    model = PeftModel.from_pretrained(model, adapter, config=config, is_trainable=True)
    config.train_backbone = config.train_backbone or streams.train_backbone  # a trained backbone stays in every save
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
