"""What an adapter or a checkpoint is, read off its small files and the headers of its weights."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .folders import ADAPTER_WEIGHTS, TensorFiles, find_checkpoint, read_json
from .published import PUBLISHED_TYPE
from .reference import REFERENCE_FILE, read_reference
from .sources import read_adapter_config


_STREAM_TENSORS = re.compile(r"(^|\.)(parscale(_|\.)|prefix_[kv]$|aggregate_layer\.)")
_LORA_TENSORS = re.compile(r"\.lora_(embedding_)?[AB](\.weight)?$")


@dataclass
class Inspection:
    """Kind and contents of a folder; None where the folder doesn't say.

    `kind` is "adapter", "standalone checkpoint", "published checkpoint" or "plain checkpoint". Parameters are counted:
    `added` are those of the streams, `shared_lora` those of a LoRA beside them.
    """

    kind: str
    backbone: str | None
    carries_backbone: bool
    num_streams: int
    stream_transform: str
    num_prefix_tokens: int
    aggregator: str
    added_parameters: int
    shared_lora_parameters: int
    backbone_parameters: int | None
    fingerprint: dict[str, str] | None
    made_by: str | None

    @property
    def added_percent(self) -> float | None:
        """Added parameters in percent of the backbone's."""
        return None if self.backbone_parameters is None else 100 * self.added_parameters / self.backbone_parameters

    @property
    def added_percent_per_stream(self) -> float | None:
        """The same for one stream."""
        return None if self.added_percent is None else self.added_percent / self.num_streams


def inspect_folder(source: str, backbone: str | None = None) -> Inspection:
    """Look at an adapter or checkpoint without loading it.

    Args:
        source: folder or hub repository.
        backbone: folder or hub repository of the backbone of an adapter, to count its parameters. By default the one
            that the adapter names, if it is a folder here.

    Raises:
        ValueError: there is no such folder, it holds neither, or a file is damaged.
    """
    folder = find_checkpoint(source)
    if (folder / "adapter_config.json").is_file():
        return _inspect_adapter(folder, backbone)
    return _inspect_checkpoint(folder)


def _inspect_adapter(folder: Path, backbone: str | None) -> Inspection:
    config = read_adapter_config(folder)
    tensors = TensorFiles(folder, ADAPTER_WEIGHTS)
    streams, lora, own = _split(tensors.shapes)
    named = backbone or config.base_model_name_or_path
    backbone_parameters = tensors.count_values(own) if config.train_backbone else None
    if backbone_parameters is None and named and (backbone or Path(named).is_dir()):
        backbone_parameters = _count_backbone(find_checkpoint(named))
    return Inspection(
        kind="adapter",
        backbone=named,
        carries_backbone=config.train_backbone,
        num_streams=config.num_streams,
        stream_transform=config.stream_transform,
        num_prefix_tokens=config.num_prefix_tokens if config.stream_transform == "prefix" else 0,
        aggregator=config.aggregator,
        added_parameters=tensors.count_values(streams),
        shared_lora_parameters=tensors.count_values(lora),
        backbone_parameters=backbone_parameters,
        fingerprint=config.backbone_fingerprint,
        made_by=read_json(folder / "adapter_config.json").get("parscale_version"),
    )


def _inspect_checkpoint(folder: Path) -> Inspection:
    config = read_json(folder / "config.json")
    tensors = TensorFiles(folder)
    streams, lora, own = _split(tensors.shapes)
    reference = read_reference(folder) if (folder / REFERENCE_FILE).is_file() else None
    kind, fields = _describe(config)
    return Inspection(
        kind=kind,
        backbone=str(config.get("model_type")).removeprefix("parscale_").removesuffix("_parscale"),
        carries_backbone=True,
        **fields,
        added_parameters=tensors.count_values(streams),
        shared_lora_parameters=tensors.count_values(lora),
        backbone_parameters=tensors.count_values(own),
        fingerprint=None if reference is None else reference.backbone_fingerprint,
        made_by=reference.made_by if reference else config.get("parscale", {}).get("version"),
    )


def _describe(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if config.get("model_type") == PUBLISHED_TYPE:
        values = {"num_streams": config["parscale_n"], "num_prefix_tokens": config["parscale_n_tokens"]}
        return "published checkpoint", {"stream_transform": "prefix", "aggregator": "dynamic", **values}
    if "parscale" in config:
        names = ("num_streams", "stream_transform", "num_prefix_tokens", "aggregator")
        return "standalone checkpoint", {name: config["parscale"][name] for name in names}
    plain = {"num_streams": 1, "stream_transform": "none", "num_prefix_tokens": 0, "aggregator": "none"}
    return "plain checkpoint", plain


def _split(names: Iterable[str]) -> tuple[list[str], list[str], list[str]]:
    """Names of the tensors of streams, of a shared LoRA, and of a backbone."""
    streams = [name for name in names if _STREAM_TENSORS.search(name)]
    lora = [name for name in names if _LORA_TENSORS.search(name) and name not in streams]
    return streams, lora, [name for name in names if name not in streams and name not in lora]


def _count_backbone(folder: Path) -> int:
    tensors = TensorFiles(folder)
    return tensors.count_values(tensors.shapes)
