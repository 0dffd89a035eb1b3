"""Saves that prove themselves: what was written is read back and compared with the live tensors."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from ..prefix import ReparameterizedPrefix
from ..probe import is_partitioned
from ..state import backbone_shapes, checkpoint_key, expected_adapter_shapes
from .run_folder import SAVE_RECORD, write_atomically


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Hold the full values of parameters that DeepSpeed ZeRO-3 partitions; every rank must enter."""
    if not any(is_partitioned(parameter) for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


def live_tensors(model: PeftModel, adapter_name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in the file and full value of every tensor that a save of one adapter must hold; every rank must iterate."""
    modules = dict(model.named_modules())
    wanted = dict(expected_adapter_shapes(model, adapter_name))
    if model.peft_config[adapter_name].train_backbone:
        wanted |= backbone_shapes(model)
    for name in wanted:
        owner = modules[name.rpartition(".")[0]]
        parameters = list(owner.parameters(recurse=isinstance(owner, ReparameterizedPrefix)))
        with gathered(parameters), torch.no_grad():
            if isinstance(owner, ReparameterizedPrefix):
                value = owner.folded()
            else:
                value = getattr(owner, name.rpartition(".")[2]).detach()
            yield checkpoint_key(name, adapter_name), value.full_tensor() if isinstance(value, DTensor) else value


def verify_save(model: PeftModel, folder: str | Path, adapter_name: str, is_main_process: bool = True) -> int:
    """Compare a saved adapter with the live model, tensor by tensor; every rank must call it.

    Returns:
        The number of tensors in the file.

    Raises:
        ValueError: the file is missing, incomplete, or a value differs.
    """
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if is_main_process and not path.is_file():
        raise ValueError(f"The save to {folder} is incomplete: {path.name} was not written.")
    problems, seen = [], set()
    reader = safe_open(path, "pt") if is_main_process else None
    for name, value in live_tensors(model, adapter_name):
        if reader is None:
            continue
        seen.add(name)
        if name not in reader.keys():  # noqa: SIM118
            problems.append(f"{name} is missing")
        elif not _same_values(reader.get_tensor(name), value):
            problems.append(f"{name} differs from the live tensor")
    if reader is not None:
        problems += [f"{name} is unexpected" for name in set(reader.keys()) - seen if _is_own(name)]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"The save to {path} does not hold what was trained: {'; '.join(problems[:3])}{more}.")
    return len(seen)


def _same_values(saved: torch.Tensor, live: torch.Tensor) -> bool:
    return saved.shape == live.shape and torch.equal(saved, live.to(device="cpu", dtype=saved.dtype))


def _is_own(name: str) -> bool:
    return "parscale_" in name


def record_verified(folder: str | Path, num_tensors: int) -> None:
    """Mark a folder as completely saved; written last."""
    write_atomically(Path(folder) / SAVE_RECORD, json.dumps({"num_tensors": num_tensors}))


@contextmanager
def replacing_folder(target: Path, is_main_process: bool = True) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on success its files replace those of the same name in `target`.

    On failure nothing in `target` has changed. Other than the main process, ranks get a path and touch nothing.
    """
    staging = target.with_name(f".{target.name}.incomplete-{os.getpid()}")
    if not is_main_process:
        yield staging
        return
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        target.mkdir(parents=True, exist_ok=True)
        for path in staging.iterdir():
            if path.is_dir():
                shutil.rmtree(target / path.name, ignore_errors=True)
            os.replace(path, target / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
