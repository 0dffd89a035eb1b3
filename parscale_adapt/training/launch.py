"""How a recipe starts: the net around it, and the folder that it claims."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import SaveStrategy

from .arguments import BackboneArguments
from .embedded import embedded_backbone
from .embedded_teacher import embedded_teacher
from .failures import command_to_resume, ending_in_one_sentence
from .parsing import RecipeParser
from .run_folder import RunFolder
from .saving import check_room
from .stream_config import RecipeConfig
from .stream_training import StreamTraining


def run_recipe(main: Callable[..., None], parser: RecipeParser, arguments: Sequence[str]) -> None:
    """Parse the arguments and run `main`; what goes wrong ends with one sentence on stderr and exit code 1."""
    with ending_in_one_sentence(command_to_resume(sys.argv[0], arguments)):
        main(*parser.parse_args_and_config(arguments))


def open_run_folder(training: RecipeConfig, identity: dict[str, Any]) -> str | None:
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


def train(trainer: StreamTraining, checkpoint: str | None) -> None:
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


def teacher_path(teacher: str | None, backbone: BackboneArguments) -> str:
    """Name or folder of the adapter that teaches; that of the embedded backbone is trained on first use."""
    return str(embedded_teacher(backbone.embedded_dir)) if teacher is None else teacher
