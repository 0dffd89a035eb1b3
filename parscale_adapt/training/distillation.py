"""Teacher and student of one backbone, and the questions and answers on which they are compared."""

from datasets import Dataset

from ..checkpoints.folders import find_adapter
from ..checkpoints.whole import check_adapter_folder
from ..data.packing import IGNORED_LABEL
from ..tuner.config import ParScaleArguments, ParScaleConfig
from .arguments import BackboneArguments
from .checks import prepare_training
from .instructions import InstructionArguments
from .stream_config import StreamDistillationConfig
from .unused_options import DISTILL, refuse_unused_options


def prepare_distillation(
    training: StreamDistillationConfig,
    backbone: BackboneArguments,
    streams: ParScaleArguments,
    data: InstructionArguments,
) -> None:
    """Set what distillation needs in TRL's arguments, and look at the teacher.

    Raises:
        ValueError: there is no teacher, or it and the student can't share a backbone; or an option has no effect.
    """
    refuse_unused_options(training, DISTILL)
    if streams.train_backbone:
        raise ValueError(
            "`train_backbone=True` can't be distilled into: teacher and student run on one backbone, which stays as it is."
        )
    if data.train_on != "last_answer":
        raise ValueError(
            f"`train_on` must be last_answer in distill.py, got {data.train_on!r}: teacher and student are compared on one "
            "answer to each question."
        )
    teacher = training.teacher_model_name_or_path
    if teacher is None and backbone.model_name_or_path is not None:
        raise ValueError(
            "`teacher_model_name_or_path` is missing: name the adapter that teaches, on the same backbone."
        )
    if teacher is not None:
        _check_teacher(teacher)
    prepare_training(training, backbone)
    training.model_init_kwargs = None  # the model comes as an object


def _check_teacher(teacher: str) -> None:
    folder = find_adapter(teacher).folder
    check_adapter_folder(folder)
    config = ParScaleConfig.from_pretrained(str(folder))
    if config.train_backbone:
        raise ValueError(
            f"{teacher} carries a trained backbone, and a student on the same backbone would have to be trained on that one: "
            "take a teacher that was trained on a frozen backbone."
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"{teacher} is an adapter for {config.task_type}, and only CAUSAL_LM can teach: take another one."
        )


def with_answers(rows: Dataset) -> Dataset:
    """Rows of token ids and labels as questions and answers, each a list of ids; an answer begins at the first label."""

    def split(row: dict[str, list[int]]) -> dict[str, list[int]]:
        start = next(place for place, label in enumerate(row["labels"]) if label != IGNORED_LABEL)
        end = max(place for place, label in enumerate(row["labels"]) if label != IGNORED_LABEL) + 1
        return {"prompt": row["input_ids"][:start], "completion_ids": row["input_ids"][start:end]}

    return rows.map(split, remove_columns=rows.column_names)
