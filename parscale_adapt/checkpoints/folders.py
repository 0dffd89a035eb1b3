"""Folders of weights: found, opened and checked before anything large is read. Safetensors only."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open


MODEL_WEIGHTS = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


def find_checkpoint(source: str) -> Path:
    """The folder of a checkpoint: `source` itself, or the snapshot of that hub repository.

    Raises:
        ValueError: there is neither.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{source} is a file: give the folder that holds the checkpoint.")
    if len(folder.parts) != 2 or not folder.parent.name.strip("."):
        raise ValueError(f"There is no folder {source}.")
    try:
        return Path(snapshot_download(source, allow_patterns=list(_DOWNLOADED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"There is no folder {source}, and it can't be fetched from the hub: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: the file is missing, or holds no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no {path.name}: give the folder of a checkpoint.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is no JSON ({error}): copy or download it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged, it holds no JSON object: copy or download it again.")
    return values


class TensorFiles:
    """The tensors of a folder, read one at a time. Reading maps the file into memory and copies nothing.

    Args:
        folder: holds `weights_name`, or shards of it and their index.
        weights_name: `model.safetensors` or `adapter_model.safetensors`.

    Raises:
        ValueError: there are no such files, a pickle stands in their place, or one of them is damaged.
    """

    def __init__(self, folder: Path, weights_name: str = MODEL_WEIGHTS):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._file_of: dict[str, Path] = {}
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
                raise ValueError(f"{self.folder} is incomplete: its index names {shard}, which is not there.")
            self._open(self.folder / shard)
        lost = sorted(weight_map.keys() - self._file_of.keys())
        if lost:
            raise ValueError(f"{self.folder} is incomplete: its index names {lost[0]}, which no shard holds.")

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as reader:
                for name in reader.keys():  # noqa: SIM118 (not a dict)
                    tensor = reader.get_slice(name)
                    self.shapes[name] = tuple(tensor.get_shape())
                    self.dtypes[name] = tensor.get_dtype()
                    self._file_of[name] = path
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is truncated or damaged and can't be read as safetensors ({error}): copy or download it again."
            ) from error

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped from its file."""
        with safe_open(self._file_of[name], "pt") as reader:
            return reader.get_tensor(name)

    def count_values(self, names: Iterable[str]) -> int:
        """How many numbers these tensors hold."""
        return sum(torch.Size(self.shapes[name]).numel() for name in names)


def _describe_missing(folder: Path, weights_name: str) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is read: convert it to "
            "safetensors first, with `save_pretrained` of the library that wrote it."
        )
    return f"{folder} holds no weights: there is no {weights_name}."
