"""What a backbone or an adapter must not be when the two are put together; checked before anything is changed."""

import warnings
from collections.abc import Collection, Iterable, Mapping

from peft import TaskType
from torch import nn
from transformers import PreTrainedModel

from ..hf.backbone import find_decoder
from ..hf.engines import offloaded_modules
from ..hf.fingerprint import describe_difference
from ..hf.stream_call import STREAMS_ATTRIBUTE
from .config import HEADS_OF_TASKS, ParScaleConfig
from .layer import ParScaleLayer


_LOADERS = {
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
}


def refuse_missing_head(model: PreTrainedModel, config: ParScaleConfig) -> None:
    """Raises ValueError where the model lacks the head of `task_type`, or what a start by its own text needs."""
    task, class_name = config.task_type, type(model).__name__
    heads = HEADS_OF_TASKS.get(task, ())
    if task == TaskType.CAUSAL_LM and model.get_output_embeddings() is None:
        raise ValueError(
            f"{class_name} is not a causal LM with an LM head: load the backbone with `AutoModelForCausalLM`, or name "
            "its task in `task_type`."
        )
    if heads and not any(name.endswith(heads) for name, _ in model.named_modules()):
        raise ValueError(
            f"`task_type={TaskType(task).value!r}` trains the head {' or '.join(heads)}, which {class_name} doesn't have: "
            f"load the backbone with `{_LOADERS[task]}`."
        )
    starts_by_text = config.init_weights in ("tokens", "near_identity") and config.num_streams > 1
    if starts_by_text and not config.is_being_loaded and model.get_output_embeddings() is None:
        raise ValueError(
            f"`init_weights={config.init_weights!r}` starts from text that the backbone generates, and {class_name} has no "
            "LM head to generate with: use 'normal'."
        )


def name_head(config: ParScaleConfig) -> None:
    """Let `modules_to_save` name the head of `task_type`, as PEFT does before it attaches an adapter or after, once."""
    heads = HEADS_OF_TASKS.get(config.task_type)
    if heads:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))


def refuse_second_tuner(model: nn.Module) -> None:
    """Raises ValueError where the model holds the streams of another PEFT model."""
    if any(isinstance(module, ParScaleLayer) for module in model.modules()):
        raise ValueError(
            "The backbone already holds streams of another adapter: add adapters by `add_adapter` of that one's PEFT "
            "model, or call its `unload()` first."
        )


def refuse_loading_by_transformers(model: nn.Module, config: ParScaleConfig) -> None:
    """Raises ValueError where transformers' own `load_adapter`, which doesn't know streams' tensors by their names, would
    leave them as they were drawn. Its `add_adapter` notes that there are adapters before it attaches one, and so a
    saved configuration starts a new one there."""
    if config.backbone_fingerprint is not None and not getattr(model, "_hf_peft_config_loaded", False):
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


def refuse_quantized_copies(model: nn.Module, config: ParScaleConfig) -> None:
    """Raises ValueError where `modules_to_save` names a quantized module, of which PEFT can't train a copy."""
    for name, parameter in model.named_parameters():
        module_name = name.rpartition(".")[0]
        if not parameter.is_floating_point() and copying_entry(config, module_name) is not None:
            raise ValueError(
                f"`modules_to_save` trains a copy of `{module_name}`, which is quantized: load the backbone with "
                f"`llm_int8_skip_modules=[{module_name!r}]` in its `BitsAndBytesConfig`."
            )


def refuse_offloaded_backbone(model: nn.Module, config: ParScaleConfig) -> None:
    """Raises ValueError where weights that accelerate offloads are to be trained, copied or wrapped by PEFT."""
    for name in offloaded_modules(model):
        copied = copying_entry(config, name)
        reason = (
            "`train_backbone=True` trains"
            if config.train_backbone
            else f"`modules_to_save` with {copied!r} trains a copy of"
            if copied
            else "`lora` wraps"
            if config.lora
            else None
        )
        if reason is not None:
            raise ValueError(
                f"{reason} weights that have to stay in memory, but accelerate offloads `{name}`: leave it out, or load "
                "the backbone without offloading."
            )


def refuse_copied_hosts(config: ParScaleConfig, hosts: Iterable[str]) -> None:
    """Raises ValueError where `modules_to_save`, of which PEFT trains copies, would copy a module that holds streams or
    runs in them."""
    for name in hosts:
        copied = copying_entry(config, f"{name}.{STREAMS_ATTRIBUTE}")
        if copied is not None:
            raise ValueError(
                f"`modules_to_save` names {copied!r}, but PEFT would train a copy of `{name}`, in which streams run: "
                "leave it out."
            )


def copying_entry(config: ParScaleConfig, module_name: str) -> str | None:
    """The entry of `modules_to_save` for which PEFT copies a module, or one around it; PEFT compares endings of names."""
    parts = module_name.split(".")
    around = [".".join(parts[: count + 1]) for count in range(len(parts))]
    entries = config.modules_to_save or ()
    return next((entry for entry in entries if any(name.endswith(entry) for name in around)), None)


def refuse_unusable_name(name: str) -> None:
    """Raises ValueError for what module dictionaries, in which PEFT keeps adapters, or its wrappers can't take."""
    if not name or "." in name or hasattr(nn.ModuleDict, name) or name == "base_layer":
        raise ValueError(f"An adapter can't be named {name!r}: take a name without dots, such as 'default'.")


def check_fingerprint(
    config: ParScaleConfig, found: dict[str, str], model_name: str, ignored: Collection[str] = ()
) -> None:
    """Compare the fingerprint of a saved adapter with that of the backbone that it is loaded on.

    Args:
        config: of the adapter.
        found: the backbone's fingerprint.
        model_name: what to call the backbone.
        ignored: names of entries that need not agree, besides the tensors that the adapter brings itself.

    Raises:
        ValueError: the adapter was trained on another backbone; a warning with `verify_backbone=False`.
    """
    if config.backbone_fingerprint is None:
        return
    tensors = found.keys() - {"shape"}
    brought = [name for name in tensors if config.train_backbone or copying_entry(config, name.rpartition(".")[0])]
    difference = describe_difference(config.backbone_fingerprint, found, {*brought, *ignored})
    if difference is None:
        return
    message = f"The adapter was trained on another backbone than this {model_name}: {difference}."
    if config.verify_backbone:
        raise ValueError(
            f"{message} Load the backbone that it was trained on, or pass `verify_backbone=False` if you know that they "
            "fit."
        )
    warnings.warn(f"{message} Going on because of `verify_backbone=False`.", stacklevel=2)
