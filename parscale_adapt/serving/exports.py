"""Classes of exported checkpoints, made known to transformers in this process."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ..checkpoints.folders import Kind, read_json
from ..models.bundle import CODE_FILE
from ..models.qwen2_parscale import Qwen2ParScaleForCausalLM


_AUTO_CLASSES = {"AutoModel": AutoModel, "AutoModelForCausalLM": AutoModelForCausalLM}


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
            f"`auto_map` in the config.json of {folder} must name classes of {CODE_FILE}, got {json.dumps(places)}: "
            "export again with `parscale export ADAPTER --output DIR`."
        )
    if not (folder / CODE_FILE).is_file():
        raise ValueError(f"{folder} is incomplete, it lacks {CODE_FILE}: export again, or get the whole folder.")
    return dict(places)
