"""Whether an adapter belongs to a backbone, told by their files before weights load."""

from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedConfig

from ..hf.fingerprint import shape_entry, tensor_entry
from ..tuner.config import ParScaleConfig
from ..tuner.refusals import check_fingerprint
from .headers import ADAPTER_WEIGHTS, TensorHeaders


_IN_PEFT = "base_model.model."


def check_belonging(adapter: Path, config: ParScaleConfig, backbone: Path, backbone_config: PreTrainedConfig) -> None:
    """Compare what an adapter says of its backbone with the backbone's files.

    PEFT compares again when it loads. Tensors that the files know by other names are left to that.

    Args:
        adapter, backbone: their folders.
        config, backbone_config: their configurations.

    Raises:
        ValueError: the adapter was trained on another backbone; a warning with `verify_backbone=False`.
    """
    expected = config.backbone_fingerprint
    if expected is None:
        return
    files = TensorHeaders(backbone).files
    found = {"shape": shape_entry(backbone_config)}
    for name in expected.keys() & files.keys():
        with safe_open(files[name], framework="pt") as file:  # mapped, so that only what is sampled is read
            entry = tensor_entry(file.get_tensor(name))
        if entry is not None:
            found[name] = entry
    brought = TensorHeaders(adapter, ADAPTER_WEIGHTS).files
    ignored = {name for name in found if f"{_IN_PEFT}{name}" in brought}
    try:
        check_fingerprint(config, found, "backbone", ignored)
    except ValueError as error:
        raise ValueError(f"The adapter {adapter} does not belong to {backbone}: {error}") from error
