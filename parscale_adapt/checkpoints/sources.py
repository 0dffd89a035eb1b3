"""An adapter and its backbone, loaded to be exported; everything is checked before weights are read."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from ..tuner.config import ParScaleConfig
from .folders import ADAPTER_WEIGHTS, TensorFiles, find_checkpoint, read_json


@dataclass
class Source:
    """What is exported: a folder with an adapter and, unless the adapter carries one, a backbone with its name.

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
        ValueError: there is no such adapter, it is of another method, a file is damaged, or no backbone is known.
    """
    folder = find_checkpoint(adapter)
    config = read_adapter_config(folder)
    TensorFiles(folder, ADAPTER_WEIGHTS)
    name = backbone or config.base_model_name_or_path
    if name:
        backbone_folder = find_checkpoint(name)
        fields = read_json(backbone_folder / "config.json")
        if "parscale" in fields or "parscale_n" in fields:
            raise ValueError(f"The backbone {name} has streams of its own: give the plain model.")
        TensorFiles(backbone_folder)
        return Source(folder, config, fields.get("model_type", ""), backbone_folder, name)
    if not (config.train_backbone and (folder / "config.json").is_file()):
        raise ValueError(f"The adapter {adapter} names no backbone: give --backbone.")
    return Source(folder, config, read_json(folder / "config.json").get("model_type", ""), None, None)


def read_adapter_config(folder: Path) -> ParScaleConfig:
    """The configuration of a ParScale adapter.

    Raises:
        ValueError: there is none, or it is one of another method.
    """
    method = read_json(folder / "adapter_config.json").get("peft_type")
    if method != "PARSCALE":
        raise ValueError(f"{folder} is no ParScale adapter: its method is {method}.")
    return ParScaleConfig.from_pretrained(folder)


def load_source(source: Source, dtype: torch.dtype | None = None) -> PeftModel:
    """The adapter on its backbone, on the CPU, in evaluation mode.

    In its own dtype a backbone is mapped from its files and not copied.

    Raises:
        ValueError: the backbone lacks tensors, or adapter and backbone don't fit.
    """
    model = _empty_backbone(source, dtype) if source.backbone is None else _mapped_backbone(source.backbone, dtype)
    return PeftModel.from_pretrained(model, source.adapter, config=source.config, torch_device="cpu").eval()


def _empty_backbone(source: Source, dtype: torch.dtype | None) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(source.adapter)
    with no_init_weights():  # all of them come from the adapter
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype)
    model.tie_weights()
    return model


def _mapped_backbone(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"The backbone {folder} is incomplete: it lacks {len(missing)} tensors, first {missing[0]}.")
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"The backbone {folder} does not fit its configuration: {name} is {tuple(found)} instead of {tuple(wanted)}."
        )
    return model
