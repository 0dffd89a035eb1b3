"""What the recipes share: arguments, checks, the trainer's additions, saves that prove themselves, reports."""

from .arguments import BackboneArguments, DataArguments
from .checks import check_run, prepare_packed_training, prepare_training
from .instructions import InstructionArguments, load_instructions, prepare_instruction_training
from .launch import backbone_path, open_run_folder, run_identity, run_recipe, trainable_model
from .report import finish_run
from .stream_statistics import StreamStatisticsCallback
from .trainer import StreamTrainer


__all__ = [
    "BackboneArguments",
    "DataArguments",
    "InstructionArguments",
    "StreamStatisticsCallback",
    "StreamTrainer",
    "backbone_path",
    "check_run",
    "finish_run",
    "load_instructions",
    "open_run_folder",
    "prepare_instruction_training",
    "prepare_packed_training",
    "prepare_training",
    "run_identity",
    "run_recipe",
    "trainable_model",
]
