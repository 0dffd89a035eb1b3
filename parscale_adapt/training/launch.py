"""How a recipe starts: the net around it, the folder that it claims, and which model it trains."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig

from ..checkpoints.folders import find_adapter
from ..tuner.config import CHOICES_OF_A_RUN, ParScaleArguments, ParScaleConfig
from ..tuner.state import backbone_shapes
from .arguments import BackboneArguments
from .embedded import embedded_backbone
from .failures import command_to_resume, ending_in_one_sentence
from .parsing import RecipeParser
from .run_folder import RunFolder
from .saving import check_room
from .trainer import StreamTrainer


def run_recipe(main: Callable[..., None], parser: RecipeParser, arguments: Sequence[str]) -> None:
    """Parse the arguments and run `main`; what goes wrong ends with one sentence on stderr and exit code 1."""
    with ending_in_one_sentence(command_to_resume(sys.argv[0], arguments)):
        main(*parser.parse_args_and_config(arguments))


def open_run_folder(training: SFTConfig, identity: dict[str, Any]) -> str | None:
    """Claim the output folder on the main process, and tell every rank the checkpoint to go on from.

    Raises:
        ValueError: on every rank, as [`RunFolder.open`], or since the folder can't be written.
    """
    answer: list[str | None] = [None, None]
    if training.process_index == 0:
        try:
            answer[0] = RunFolder(training.output_dir, identity).open(training.resume_from_checkpoint)
        except (ValueError, OSError) as error:
            answer[1] = str(error)
    checkpoint, refusal = broadcast_object_list(answer)
    if refusal is not None:
        raise ValueError(refusal)
    return checkpoint


def train(trainer: StreamTrainer, checkpoint: str | None) -> None:
    """Train, from a checkpoint if one is named; how near a near-identity start came is said first.

    Raises:
        TrainingStopped: an error after the first step; earlier ones come as they are.
        ValueError: the disk has no room for what is trained.
    """
    if trainer.args.should_save:
        num_saves = 1 if trainer.args.save_strategy == SaveStrategy.NO else 2
        check_room(trainer.model, Path(trainer.args.output_dir), num_saves)
        start = trainer.near_identity_start()
        if start is not None and checkpoint is None:
            print(f"Near-identity start: {start}.")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except Exception as error:
        if not trainer.has_begun:
            raise
        raise trainer.stopped_by(error) from error


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
    config = ParScaleConfig.from_pretrained(str(find_adapter(adapter).folder))
    if config.train_backbone and backbone.load_in_4bit:
        raise ValueError(
            f"{adapter} carries a trained backbone, which 4-bit weights can't hold: leave --load_in_4bit out."
        )
    _take_streams_from(config, streams, backbone)
    config.verify_backbone = backbone.verify_backbone
    config.stream_chunk_size = streams.stream_chunk_size
    model = AutoModelForCausalLM.from_pretrained(
        path, **backbone.model_init_kwargs(), quantization_config=backbone.quantization_config()
    )
    model = PeftModel.from_pretrained(model, adapter, config=config, is_trainable=True)
    config = model.peft_config["default"]  # the model's own copy
    config.train_backbone = config.train_backbone or streams.train_backbone  # a trained backbone stays in every save
    trained = backbone_shapes(model)
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(streams.train_backbone)
    return model, None


def _take_streams_from(config: ParScaleConfig, streams: ParScaleArguments, backbone: BackboneArguments) -> None:
    """Let `streams` say what the adapter is.

    Raises:
        ValueError: a setting was given, and the adapter has another.
    """
    for field in dataclasses.fields(ParScaleArguments):
        if field.name == "train_backbone" or field.name in CHOICES_OF_A_RUN:
            continue
        here, stored = getattr(streams, field.name), getattr(config, field.name)
        is_given = field.name in backbone.explicit_settings or here != field.default
        if is_given and here != stored:
            raise ValueError(
                f"`{field.name}` is {here!r}, but the adapter {backbone.adapter_name_or_path} was trained with "
                f"{stored!r}: leave it out, or give {stored!r}."
            )
        setattr(streams, field.name, stored)
