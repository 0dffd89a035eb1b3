"""Folders of checkpoints: found, and told apart before anything is loaded."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


ADAPTER_CONFIG = "adapter_config.json"
PUBLISHED_TYPE = "qwen2_parscale"
_METHOD = "PARSCALE"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


@dataclass(frozen=True)
class Kind:
    """What a folder holds.

    Args:
        name: "adapter", "standalone", "published" or "plain".
        folder: where it is.
        config: the fields of `adapter_config.json` or `config.json`.
        num_streams, stream_transform, num_prefix_tokens, aggregator: of its streams; a plain checkpoint has one.
    """

    name: str
    folder: Path
    config: dict[str, Any] = field(repr=False)
    num_streams: int = 1
    stream_transform: str | list[str] = "none"
    num_prefix_tokens: int = 0
    aggregator: str = "none"

    @property
    def owns_streams(self) -> bool:
        """Whether it is a checkpoint with streams of its own."""
        return self.name in ("standalone", "published")


def find_kind(source: str | Path) -> Kind:
    """Look at a folder or hub repository without loading it.

    Raises:
        ValueError: there is none, or it holds neither a ParScale adapter nor a checkpoint.
    """
    folder = find_checkpoint(str(source))
    path = folder / (ADAPTER_CONFIG if (folder / ADAPTER_CONFIG).is_file() else "config.json")
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no config.json and no adapter_config.json: give the folder of an adapter or a checkpoint."
        )
    config = read_json(path)
    try:
        if path.name == ADAPTER_CONFIG:
            return _adapter(folder, config)
        if config.get("model_type") == PUBLISHED_TYPE:
            streams = {"num_streams": config["parscale_n"], "num_prefix_tokens": config["parscale_n_tokens"]}
            return Kind("published", folder, config, stream_transform="prefix", aggregator="dynamic", **streams)
        if "parscale" in config:
            return Kind("standalone", folder, config, **_streams_of(config["parscale"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, it lacks {error} of its streams: copy or download it again.") from error
    return Kind("plain", folder, config)


def find_adapter(source: str | Path) -> Kind:
    """As [`find_kind`], where an adapter is asked for.

    Raises:
        ValueError: it is none.
    """
    kind = find_kind(source)
    if kind.name != "adapter":
        raise ValueError(f"{source} must hold a ParScale adapter, got a {kind.name} checkpoint: give another folder.")
    return kind


def _adapter(folder: Path, config: dict[str, Any]) -> Kind:
    if config.get("peft_type") != _METHOD:
        raise ValueError(
            f"{folder} must hold a ParScale adapter, got one of the method {config.get('peft_type')}: give another."
        )
    streams = _streams_of(config)
    if "prefix" not in transform_names(streams["stream_transform"]):
        streams["num_prefix_tokens"] = 0
    return Kind("adapter", folder, config, **streams)


def _streams_of(config: dict[str, Any]) -> dict[str, Any]:
    names = ("num_streams", "stream_transform", "num_prefix_tokens", "aggregator")
    return {name: config[name] for name in names}


def transform_names(stream_transform: str | Sequence[str]) -> list[str]:
    """What the field of a configuration names, one or several."""
    return [stream_transform] if isinstance(stream_transform, str) else [*stream_transform]


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
        raise ValueError(
            f"There is no folder {source}: give one that is here, or the name of a repository on the hub."
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(_DOWNLOADED)))
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


def find_tokenizer(folders: Sequence[Path]) -> Path:
    """The first folder that holds a tokenizer.

    Raises:
        ValueError: none does.
    """
    for folder in folders:
        if has_tokenizer(folder):
            return folder
    places = " or ".join(map(str, folders))
    raise ValueError(f"There is no tokenizer in {places}: copy tokenizer.json and tokenizer_config.json there.")


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer was saved there."""
    return any((folder / name).is_file() for name in _TOKENIZERS)
