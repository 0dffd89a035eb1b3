"""Whether the files of a backbone or an adapter are what their names say: looked at before anything is loaded."""

from pathlib import Path

from ..files import is_lfs_pointer
from .folders import ADAPTER_CONFIG, read_json
from .headers import ADAPTER_WEIGHTS, TensorHeaders


_JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_OTHER_FILES = ("*.safetensors", "*.model", "merges.txt", "*.jinja")


def check_backbone_folder(folder: Path) -> None:
    """Refuse a folder whose model or tokenizer can't be read.

    Raises:
        ValueError: a file is a pointer of git-lfs, cut, damaged or missing; it is named, with what to do.
    """
    check_model_files(folder)
    read_json(folder / "config.json")
    TensorHeaders(folder)


def check_adapter_folder(folder: Path) -> None:
    """Refuse a folder whose adapter can't be read.

    Raises:
        ValueError: as [`check_backbone_folder`].
    """
    check_model_files(folder)
    read_json(folder / ADAPTER_CONFIG)
    TensorHeaders(folder, ADAPTER_WEIGHTS)


def check_model_files(folder: Path) -> None:
    """Refuse files that stand for others or are no JSON; of safetensors, only what stands for them.

    Raises:
        ValueError: as [`check_backbone_folder`].
    """
    present = [folder / name for name in _JSON_FILES if (folder / name).is_file()]
    for path in [*present, *(path for pattern in _OTHER_FILES for path in sorted(folder.glob(pattern)))]:
        if is_lfs_pointer(path):
            raise ValueError(f"{path} is a pointer of git-lfs and not the file: run `git lfs pull` in {folder}.")
    for path in present:
        read_json(path)
