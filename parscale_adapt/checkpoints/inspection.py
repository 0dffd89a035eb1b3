"""What an adapter or a checkpoint is, read off its small files and the headers of its weights."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .folders import Kind, find_kind
from .headers import ADAPTER_WEIGHTS, REFERENCE_FILE, TensorHeaders, is_of_streams


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
    stream_transform: str | list[str]
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
    kind = find_kind(source)
    return _inspect_adapter(kind, backbone) if kind.name == "adapter" else _inspect_checkpoint(kind)


def _inspect_adapter(kind: Kind, backbone: str | None) -> Inspection:
    tensors = TensorHeaders(kind.folder, ADAPTER_WEIGHTS)
    streams, lora, own = _split(tensors.shapes)
    carries_backbone = bool(kind.config.get("train_backbone"))
    named = backbone or kind.config.get("base_model_name_or_path")
    backbone_parameters = tensors.count_values(own) if carries_backbone else None
    if backbone_parameters is None and named and (backbone or Path(named).is_dir()):
        backbone_parameters = _count_backbone(named)
    return Inspection(
        kind="adapter",
        backbone=named,
        carries_backbone=carries_backbone,
        **_streams_of(kind),
        added_parameters=tensors.count_values(streams),
        shared_lora_parameters=tensors.count_values(lora),
        backbone_parameters=backbone_parameters,
        fingerprint=kind.config.get("backbone_fingerprint"),
        made_by=kind.config.get("parscale_version"),
    )


def _inspect_checkpoint(kind: Kind) -> Inspection:
    tensors = TensorHeaders(kind.folder)
    streams, lora, own = _split(tensors.shapes)
    has_reference = (kind.folder / REFERENCE_FILE).is_file()
    reference = TensorHeaders(kind.folder, REFERENCE_FILE).metadata if has_reference else {}
    return Inspection(
        kind=f"{kind.name} checkpoint",
        backbone=str(kind.config.get("model_type")).removeprefix("parscale_").removesuffix("_parscale"),
        carries_backbone=True,
        **_streams_of(kind),
        added_parameters=tensors.count_values(streams),
        shared_lora_parameters=tensors.count_values(lora),
        backbone_parameters=tensors.count_values(own),
        fingerprint=json.loads(reference.get("backbone_fingerprint", "null")),
        made_by=reference.get("made_by") or kind.config.get("parscale", {}).get("version"),
    )


def _streams_of(kind: Kind) -> dict[str, Any]:
    names = ("num_streams", "stream_transform", "num_prefix_tokens", "aggregator")
    return {name: getattr(kind, name) for name in names}


def _split(names: Iterable[str]) -> tuple[list[str], list[str], list[str]]:
    """Names of the tensors of streams, of a shared LoRA, and of a backbone."""
    streams = [name for name in names if is_of_streams(name)]
    lora = [name for name in names if _LORA_TENSORS.search(name) and name not in streams]
    return streams, lora, [name for name in names if name not in streams and name not in lora]


def _count_backbone(source: str) -> int:
    tensors = TensorHeaders(find_kind(source).folder)
    return tensors.count_values(tensors.shapes)
