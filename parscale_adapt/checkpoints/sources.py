"""An adapter and its backbone, loaded for use; everything is checked before weights are read."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, TaskType
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from ..tuner import model as _  # noqa: F401  (registers the method)
from ..tuner.config import ParScaleConfig
from .folders import Kind, find_adapter, find_kind, read_json
from .headers import ADAPTER_WEIGHTS, TensorHeaders


@dataclass
class Source:
    """A folder with an adapter and, unless the adapter carries one, a backbone with its name.

    `model_type` is the backbone's.
    """

    adapter: Path
    config: ParScaleConfig
    model_type: str
    backbone: Path | None
    backbone_name: str | None

    @property
    def tokenizer_folders(self) -> list[Path]:
        """Where a tokenizer may be, the adapter's own first."""
        return [folder for folder in (self.adapter, self.backbone) if folder is not None]


def find_source(adapter: str, backbone: str | None = None) -> Source:
    """Look at an adapter and its backbone without loading them.

    Args:
        adapter: folder or hub repository.
        backbone: folder or hub repository; the one that the adapter names by default.

    Raises:
        ValueError: there is no such adapter, it is of another method or task, a file is damaged, or no backbone is known.
    """
    folder = find_adapter(adapter).folder
    config = ParScaleConfig.from_pretrained(str(folder))
    if config.task_type not in (None, TaskType.CAUSAL_LM):
        raise ValueError(
            f"The adapter {adapter} is for {TaskType(config.task_type).value}, and this is for causal LMs alone: load it with "
            "PEFT on its backbone."
        )
    TensorHeaders(folder, ADAPTER_WEIGHTS)
    name = backbone or config.base_model_name_or_path
    if name:
        kind = _find_backbone(name, adapter)
        if kind.name != "plain":
            raise ValueError(
                f"The backbone must be a plain checkpoint, got {name}, {_describe(kind)}: give the plain one."
            )
        TensorHeaders(kind.folder)
        return Source(folder, config, kind.config.get("model_type", ""), kind.folder, name)
    if not (config.train_backbone and (folder / "config.json").is_file()):
        raise ValueError(f"The adapter {adapter} names no backbone: give one with --backbone.")
    return Source(folder, config, read_json(folder / "config.json").get("model_type", ""), None, None)


def _find_backbone(name: str, adapter: str) -> Kind:
    try:
        return find_kind(name)
    except ValueError as error:
        raise ValueError(f"The backbone of {adapter} can't be opened, give it with --backbone: {error}") from error


def _describe(kind: Kind) -> str:
    return "an adapter" if kind.name == "adapter" else f"a {kind.name} checkpoint with streams of its own"


def load_source(source: Source, dtype: torch.dtype | None = None) -> PeftModel:
    """The adapter on its backbone, on the CPU, in evaluation mode.

    In its own dtype a backbone is mapped from its files and not copied.

    Raises:
        ValueError: the backbone lacks tensors, or adapter and backbone don't fit.
    """
    model = _empty_backbone(source, dtype) if source.backbone is None else load_backbone(source.backbone, dtype)
    return PeftModel.from_pretrained(model, source.adapter, config=source.config, torch_device="cpu").eval()


def _empty_backbone(source: Source, dtype: torch.dtype | None) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(source.adapter)
    with no_init_weights():  # all of them come from the adapter
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype)
    model.tie_weights()
    return model


def load_backbone(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A plain checkpoint on the CPU; in its own dtype it is mapped from its files and not copied.

    Raises:
        ValueError: it lacks tensors, or does not fit its configuration.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"The backbone {folder} is incomplete: it lacks {len(missing)} tensors, first {missing[0]}: get it whole."
        )
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"The backbone {folder} does not fit its config.json, {name} is {tuple(found)} instead of {tuple(wanted)}: get "
            "both from one place."
        )
    return model
