"""Which model a recipe trains: new streams on a backbone, or those of a trained adapter; and what it is compared with."""

import dataclasses
from contextlib import nullcontext
from typing import Any

from peft import (
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.reward_trainer import suppress_seqcls_warning

from ..checkpoints.folders import find_adapter
from ..tuner.config import CHOICES_OF_A_RUN, HEADS_OF_TASKS, ParScaleArguments, ParScaleConfig
from ..tuner.state import backbone_shapes
from .arguments import BackboneArguments
from .saving import whole_state


TEACHER = "teacher"


def trainable_model(
    path: str, backbone: BackboneArguments, streams: ParScaleArguments
) -> tuple[str | PeftModel, ParScaleConfig | None]:
    """What to hand to a TRL trainer as `model` and `peft_config`: new streams, or those of a trained adapter.

    Raises:
        ValueError: the adapter is of another method, stream settings were given that it does not have, or it carries
            a backbone that can't be loaded in 4 bits.
    """
    if backbone.adapter_name_or_path is None:
        return path, ParScaleConfig(task_type="CAUSAL_LM", **dataclasses.asdict(streams))
    return _trained_adapter(path, backbone, streams, TaskType.CAUSAL_LM), None


def model_in_streams(
    path: str, backbone: BackboneArguments, streams: ParScaleArguments, seed: int, task: TaskType = TaskType.CAUSAL_LM
) -> PeftModel:
    """What [`trainable_model`] hands over, already built; called again with the same arguments, it is the same model.

    Args:
        path: name or folder of the backbone.
        backbone: how to load it, and the adapter to go on with.
        streams: what to add, or what the adapter is asked to be.
        seed: of new streams and a new head.
        task: `CAUSAL_LM`, or `SEQ_CLS` for a reward model, whose head has one label.

    Raises:
        ValueError: as [`trainable_model`]; or the adapter is for another task.
    """
    set_seed(seed)
    if backbone.adapter_name_or_path is not None:
        return _trained_adapter(path, backbone, streams, task)
    config = ParScaleConfig(task_type=task.value, **dataclasses.asdict(streams))
    return get_peft_model(
        _load_backbone(path, backbone, task), config, autocast_adapter_dtype=not _keeps_type(backbone)
    )


def add_teacher(model: PeftModel, teacher: str, backbone: BackboneArguments) -> str:
    """Put the adapter of a teacher beside that of a model from [`model_in_streams`], frozen and on the same backbone.

    Returns:
        Its name in the model.

    Raises:
        ValueError: it was trained on another backbone.
    """
    model.load_adapter(teacher, TEACHER, is_trainable=False, autocast_adapter_dtype=not _keeps_type(backbone))
    return TEACHER


def reference_model(
    model: PeftModel, path: str, backbone: BackboneArguments, streams: ParScaleArguments, seed: int
) -> PreTrainedModel | None:
    """What a model from [`model_in_streams`] is before it is trained, to compare it with later.

    Returns:
        None where the backbone stays as it is: a copy of the streams is enough, which trainers make themselves. Else a
        second model, streams included.
    """
    if not model.peft_config["default"].train_backbone:
        return None
    before = model_in_streams(path, backbone, streams, seed)
    return before.requires_grad_(False).eval().get_base_model()


def _keeps_type(backbone: BackboneArguments) -> bool:
    """Under ZeRO-3 all trained tensors have the backbone's type, as in TRL, which says why."""
    return is_deepspeed_zero3_enabled() and not backbone.load_in_4bit


def _load_backbone(path: str, backbone: BackboneArguments, task: TaskType) -> PreTrainedModel:
    is_classifier = task == TaskType.SEQ_CLS
    auto_class: Any = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    options = {"num_labels": 1} if is_classifier else {}
    with suppress_seqcls_warning() if is_classifier else nullcontext():
        return auto_class.from_pretrained(
            path, **backbone.model_init_kwargs(), quantization_config=backbone.quantization_config(), **options
        )


def _trained_adapter(path: str, backbone: BackboneArguments, streams: ParScaleArguments, task: TaskType) -> PeftModel:
    adapter = backbone.adapter_name_or_path
    assert adapter is not None
    config = ParScaleConfig.from_pretrained(str(find_adapter(adapter).folder))
    stored = TaskType(config.task_type or TaskType.CAUSAL_LM)
    gets_new_head = stored == TaskType.CAUSAL_LM and task == TaskType.SEQ_CLS
    if stored != task and not gets_new_head:
        raise ValueError(
            f"{adapter} is an adapter for {stored.value}, and {task.value} is trained here: give another, or start from a "
            "backbone."
        )
    if config.train_backbone and backbone.load_in_4bit:
        raise ValueError(
            f"{adapter} carries a trained backbone, which 4-bit weights can't hold: leave --load_in_4bit out."
        )
    _take_streams_from(config, streams, backbone)
    config.verify_backbone = backbone.verify_backbone
    config.stream_chunk_size = streams.stream_chunk_size
    model = _load_backbone(path, backbone, task)
    if gets_new_head:
        model = _under_new_head(model, adapter, config)
    else:
        model = PeftModel.from_pretrained(model, adapter, config=config, is_trainable=True)
    config = model.peft_config["default"]  # the model's own copy
    config.train_backbone = config.train_backbone or streams.train_backbone  # a trained backbone stays in every save
    trained = backbone_shapes(model)
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(streams.train_backbone)
    return model


def _under_new_head(model: PreTrainedModel, adapter: str, config: ParScaleConfig) -> PeftModel:
    """The streams of a causal LM's adapter, and its trained backbone if it has one, under the head of a classifier."""
    config.task_type, config.inference_mode = TaskType.SEQ_CLS.value, False
    config.is_being_loaded = True  # so the backbone is checked, and all tensors are given
    adapted = get_peft_model(model, config)
    here = get_peft_model_state_dict(adapted, state_dict=whole_state(adapted, "default"))
    tensors = load_peft_weights(str(find_adapter(adapter).folder), device="cpu")
    vocabulary = model.config.get_text_config().vocab_size
    lm_head = {name for name, tensor in tensors.items() if name not in here and len(tensor) == vocabulary}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in lm_head}
    head = {name: tensor for name, tensor in here.items() if name.split(".")[-2] in HEADS_OF_TASKS[TaskType.SEQ_CLS]}
    set_peft_model_state_dict(adapted, tensors | head)
    return adapted


def _take_streams_from(config: ParScaleConfig, streams: ParScaleArguments, backbone: BackboneArguments) -> None:
    """Let `streams` say what the adapter is.

    Raises:
        ValueError: a setting was given, and the adapter has another.
    """
    fields = config.to_dict()
    for field in dataclasses.fields(ParScaleArguments):
        if field.name == "train_backbone" or field.name in CHOICES_OF_A_RUN:
            continue
        here, stored = getattr(streams, field.name), fields[field.name]
        is_given = field.name in backbone.explicit_settings or here != field.default
        if is_given and here != stored:
            raise ValueError(
                f"`{field.name}` is {here!r}, but the adapter {backbone.adapter_name_or_path} was trained with "
                f"{stored!r}: leave it out, or give {stored!r}."
            )
        setattr(streams, field.name, stored)
