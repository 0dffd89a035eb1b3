"""What `make demo` leaves, for a page that is given no model."""

from pathlib import Path

from ..checkpoints.folders import find_kind


DEMO = Path("runs/demo")


def find_demo(folder: Path = DEMO) -> tuple[str, list[str]]:
    """The backbone of the demo, and its adapters that share it, as `NAME=PATH`.

    Raises:
        ValueError: the demo did not run here, or not to its end.
    """
    backbones = [path.parent for path in sorted(folder.glob("backbone-*/model.safetensors"))]
    adapters = [path.parent for path in sorted(folder.glob("*/adapter_model.safetensors"))]
    frozen = [path for path in adapters if not find_kind(path).config.get("train_backbone")]
    if len(backbones) != 1 or not frozen:
        raise ValueError(
            f"There is no model in {folder}, where `make demo` leaves one: run `make demo` first, or give a model with "
            "`parscale page MODEL --adapter NAME=PATH`."
        )
    return str(backbones[0]), [f"{path.name}={path}" for path in frozen]
