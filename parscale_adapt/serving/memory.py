"""Whether the weights of a checkpoint fit into memory, before they are read."""

from collections.abc import Iterable
from pathlib import Path

import psutil
import torch


_GIB = 2**30
_CONTAINER = Path("/sys/fs/cgroup")  # of Linux, version 2


def check_memory(name: str, files: Iterable[Path], device: torch.device) -> None:
    """Refuse weights that are larger than what is free on a device; what answering needs beside them isn't counted.

    Args:
        name: of the checkpoint, for the sentence.
        files: that hold the weights, in the type in which they are loaded.
        device: that takes them.

    Raises:
        ValueError: there is less room than they need.
    """
    needed, free = sum(file.stat().st_size for file in files), free_memory(device)
    if needed > free:
        place = "the GPU" if device.type == "cuda" else "this machine"
        raise ValueError(
            f"The weights of {name} need {needed / _GIB:.1f} GiB of memory, and {free / _GIB:.1f} GiB are free on {place}: "
            "choose a smaller model, or a machine with more memory."
        )


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on a CPU, what the system and the container that it is in leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((_CONTAINER / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (_CONTAINER / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(statistics["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no such files, or no limit
        return free
