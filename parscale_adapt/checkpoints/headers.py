"""Names, shapes and types of the tensors in a folder, read off the headers of its files. Safetensors only.

A header is JSON behind its length, so that neither torch nor safetensors is needed to read it.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .folders import read_json


MODEL_WEIGHTS = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
REFERENCE_FILE = "reference_logits.safetensors"
_BYTES_OF_LENGTH = 8
_METADATA = "__metadata__"
_STREAM_TENSORS = re.compile(r"(^|\.)(parscale(_|\.)|prefix_[kv]$|aggregate_layer\.)")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def is_of_streams(name: str) -> bool:
    """Whether a tensor of an adapter or a checkpoint belongs to its streams, and not to the backbone."""
    return _STREAM_TENSORS.search(name) is not None


class TensorHeaders:
    """What the tensors of a folder are.

    `shapes`, `dtypes` (such as "BF16") and `files` are by name of tensor; `metadata` is what else the headers say.

    Args:
        folder: holds `weights_name`, or shards of it and their index.
        weights_name: such as [`MODEL_WEIGHTS`].

    Raises:
        ValueError: there are no such files, a pickle stands in their place, or one of them is damaged.
    """

    def __init__(self, folder: Path, weights_name: str = MODEL_WEIGHTS):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.files: dict[str, Path] = {}
        self.metadata: dict[str, str] = {}
        index = folder / f"{weights_name}.index.json"
        if (folder / weights_name).is_file():
            self._open(folder / weights_name)
        elif index.is_file():
            self._open_shards(index)
        else:
            raise ValueError(_describe_missing(folder, weights_name))

    def _open_shards(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map", {})
        for shard in sorted(set(weight_map.values())):
            if not (self.folder / shard).is_file():
                raise ValueError(
                    f"{self.folder} is incomplete: its index names {shard}, which is not there: download it."
                )
            self._open(self.folder / shard)
        lost = sorted(weight_map.keys() - self.files.keys())
        if lost:
            raise ValueError(
                f"{self.folder} is incomplete: its index names {lost[0]}, which no shard holds: download all."
            )

    def _open(self, path: Path) -> None:
        try:
            header = _read_header(path)
            self.metadata |= header.pop(_METADATA, {})
            for name, tensor in header.items():
                self.shapes[name] = tuple(tensor["shape"])
                self.dtypes[name] = tensor["dtype"]
                self.files[name] = path
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            raise ValueError(
                f"{path} is truncated or damaged and can't be read as safetensors ({error}): copy or download it again."
            ) from error

    def count_values(self, names: Iterable[str]) -> int:
        """How many numbers these tensors hold."""
        return sum(math.prod(self.shapes[name]) for name in names)


def _read_header(path: Path) -> dict[str, Any]:
    """The header of a file that holds all the bytes that it speaks of.

    Raises:
        ValueError, TypeError, KeyError: the file is no such file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_BYTES_OF_LENGTH), "little")
        if not 0 < length <= size - _BYTES_OF_LENGTH:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length))
    spans = sorted(tuple(tensor["data_offsets"]) for name, tensor in header.items() if name != _METADATA)
    end = 0
    for start, stop in spans:
        if start != end:
            raise ValueError(f"no tensor at byte {end}")
        end = stop
    if end != size - _BYTES_OF_LENGTH - length:
        raise ValueError(f"tensors of {end} bytes, in a file that holds {size - _BYTES_OF_LENGTH - length}")
    return header


def _describe_missing(folder: Path, weights_name: str) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is read: convert it to "
            "safetensors first, with `save_pretrained` of the library that wrote it."
        )
    return f"{folder} holds no weights: there is no {weights_name}."
