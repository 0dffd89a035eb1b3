"""Machine and versions that gave a number."""

import importlib.metadata
import platform

import torch

from ..version import __version__


def environment() -> dict[str, str]:
    """Device, threads, and versions of what computes and scores."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    versions = {"python": platform.python_version(), "parscale_adapt": __version__}
    for name in ("torch", "transformers", "peft", "lm_eval"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # lm_eval is an extra
            continue
    return {"device": f"{device}, {torch.get_num_threads()} threads", **versions}
