"""Classes of exported checkpoints, made known to transformers in this process."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ..checkpoints.folders import find_checkpoint, read_json
from ..checkpoints.published import PUBLISHED_TYPE
from ..models.bundle import CODE_FILE
from ..models.qwen2_parscale import Qwen2ParScaleForCausalLM


ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_AUTO_CLASSES = {"AutoModel": AutoModel, "AutoModelForCausalLM": AutoModelForCausalLM}


@dataclass(frozen=True)
class Kind:
    """What a folder holds: "adapter", "standalone", "published" or "backbone".

    `num_streams` is that of a checkpoint with streams of its own.
    """

    name: str
    folder: Path
    num_streams: int = 1

    @property
    def owns_streams(self) -> bool:
        """Whether it is a checkpoint with streams of its own."""
        return self.name in ("standalone", "published")


def find_kind(source: str) -> Kind:
    """Look at a folder or hub repository without loading it.

    Raises:
        ValueError: there is none, or it holds neither an adapter nor a checkpoint.
    """
    folder = find_checkpoint(source)
    if (folder / ADAPTER_CONFIG).is_file():
        return Kind("adapter", folder)
    fields = read_json(folder / "config.json")
    if fields.get("model_type") == PUBLISHED_TYPE:
        return Kind("published", folder, fields["parscale_n"])
    if "parscale" in fields:
        return Kind("standalone", folder, fields["parscale"]["num_streams"])
    return Kind("backbone", folder)


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer was saved there."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def register_classes(kind: Kind) -> type[Any]:
    """Let transformers load a checkpoint with streams of its own; returns its causal LM class.

    For a standalone export this runs the code in its folder, once its configuration is seen to be one that
    `parscale export` writes.

    Raises:
        ValueError: it is neither.
    """
    if kind.name == "published":
        return Qwen2ParScaleForCausalLM
    classes = _code_of(kind.folder)
    config_class = get_class_from_dynamic_module(classes.pop("AutoConfig"), str(kind.folder))
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    found = {name: get_class_from_dynamic_module(place, str(kind.folder)) for name, place in classes.items()}
    for name, model_class in found.items():
        _AUTO_CLASSES[name].register(config_class, model_class, exist_ok=True)
    return found["AutoModelForCausalLM"]


def _code_of(folder: Path) -> dict[str, str]:
    """Module and name of the classes of a standalone export, by their auto class."""
    fields = read_json(folder / "config.json")
    module, places = Path(CODE_FILE).stem, fields.get("auto_map") or {}
    expected = {"AutoConfig", *_AUTO_CLASSES}
    # A place may name a repository on the hub, whose code would then run.
    if places.keys() != expected or not all(str(place).rpartition(".")[0] == module for place in places.values()):
        raise ValueError(
            f"{folder} is no standalone export: its config.json should name classes of {CODE_FILE} as its code, got "
            f"{json.dumps(places)}; make one with `parscale export ADAPTER --output DIR`."
        )
    if not (folder / CODE_FILE).is_file():
        raise ValueError(f"{folder} is incomplete, it lacks {CODE_FILE}: export again, or get the whole folder.")
    return dict(places)
