"""Saves that prove themselves: what was written is read back and compared with the live tensors.

A checkpoint and the final folder are written in the same three steps: take the mark of a verified save back, write, and
mark the folder again once every tensor was read back.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from ..core.prefix import ReparameterizedPrefix
from ..files import staging_folder, write_text
from ..hf.engines import gathered
from ..tuner.state import (
    adapter_parameters,
    backbone_shapes,
    checkpoint_key,
    expected_adapter_shapes,
    fold_prefix,
    full_shape,
    saved_module_shapes,
)
from .failures import SaveFailed, describe
from .run_folder import SAVE_RECORD


@torch.no_grad()
def whole_state(model: PeftModel, adapter_name: str, keep: bool = True) -> dict[str, torch.Tensor]:
    """Name in the model and full value, on the CPU, of every parameter that a save of one adapter needs.

    However an engine shards the parameters, one at a time is gathered. Every rank must call it; those that don't
    `keep` get nothing.
    """
    _reshard(model)
    wanted = adapter_parameters(model, adapter_name).keys() | saved_module_shapes(model, adapter_name).keys()
    if model.peft_config[adapter_name].train_backbone:
        wanted |= backbone_shapes(model).keys()
    state = {}
    for name, parameter in model.named_parameters():
        if name in wanted:
            with gathered([parameter]):
                value = _full_value(parameter)
                if keep:
                    state[name] = value.to("cpu", copy=True)
    return state


def _reshard(model: nn.Module) -> None:
    """FSDP2 leaves some parameters gathered after a forward, in the type that it computes in."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _full_value(parameter: nn.Parameter) -> torch.Tensor:
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def live_tensors(model: PeftModel, adapter_name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in the file and full value of every tensor that a save of one adapter must hold; every rank must iterate."""
    _reshard(model)
    modules = dict(model.named_modules())
    copies = saved_module_shapes(model, adapter_name)
    wanted = expected_adapter_shapes(model, adapter_name) | copies
    if model.peft_config[adapter_name].train_backbone:
        wanted |= backbone_shapes(model)
    for name in wanted:
        owner = modules[name.rpartition(".")[0]]
        is_folded = isinstance(owner, ReparameterizedPrefix)
        parameters = dict(owner.named_parameters(recurse=is_folded))
        with gathered(list(parameters.values())):
            values = {key: _full_value(parameter) for key, parameter in parameters.items()}
            value = fold_prefix(owner, values) if is_folded else values[name.rpartition(".")[2]]
            key = name.replace(f".modules_to_save.{adapter_name}.", ".") if name in copies else name
            yield checkpoint_key(key, adapter_name), value


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
    saved_names = set() if reader is None else set(reader.keys())
    for name, value in live_tensors(model, adapter_name):
        if reader is None:
            continue
        seen.add(name)
        if name not in saved_names:
            problems.append(f"{name} is missing")
        elif not _same_values(reader.get_tensor(name), value):
            problems.append(f"{name} differs from the live tensor")
    problems += [f"{name} is unexpected" for name in sorted(saved_names - seen)]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"The save to {path} does not hold what was trained: {'; '.join(problems[:3])}{more}.")
    return len(seen)


def _same_values(saved: torch.Tensor, live: torch.Tensor) -> bool:
    return saved.shape == live.shape and torch.equal(saved, live.to(device="cpu", dtype=saved.dtype))


@contextmanager
def verified_save(
    model: PeftModel,
    folder: str | Path,
    adapter_name: str,
    is_main_process: bool = True,
    wait_for_everyone: Callable[[], object] = lambda: None,
) -> Iterator[None]:
    """Write a save inside; afterwards it is read back, and marked as verified. Every rank must enter.

    Args:
        model: what is saved.
        folder: where to, with the adapter's file in it.
        adapter_name: the adapter that is saved.
        is_main_process: whether this rank writes.
        wait_for_everyone: a barrier, where several ranks write into the folder.

    Raises:
        ValueError: the save does not hold what was trained; the folder then has no mark.
    """
    if is_main_process:
        forget_verified(folder)
    yield
    num_tensors = verify_save(model, folder, adapter_name, is_main_process)
    wait_for_everyone()
    if is_main_process:
        record_verified(folder, num_tensors)


def save_final_model(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    adapter_name: str,
    is_main_process: bool = True,
) -> None:
    """Write the trained adapter and its tokenizer into the output folder, verified; every rank must call it.

    Raises:
        ValueError: the save does not hold what was trained; the folder is then as it was before.
    """
    state = whole_state(model, adapter_name, keep=is_main_process)
    with (
        naming_what_was_not_written(folder, "the trained model"),
        replacing_folder(folder, is_main_process) as staging,
        verified_save(model, staging, adapter_name, is_main_process),
    ):
        if is_main_process:
            model.save_pretrained(staging, state_dict=state, selected_adapters=[adapter_name])
            tokenizer.save_pretrained(staging)


def check_room(model: nn.Module, folder: Path, num_saves: int) -> None:
    """Know before the first step that a disk is too small; optimizers and quotas are not counted.

    Args:
        model: of which the trained parameters are saved.
        folder: on the disk that takes them.
        num_saves: how many copies it must take at least.

    Raises:
        ValueError: there is less room than they need.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    needed = num_saves * sum(math.prod(full_shape(parameter)) * parameter.element_size() for parameter in trained)
    free = _free_bytes(folder)
    if free < needed:
        raise ValueError(
            f"what is trained takes at least {needed / 2**20:.1f} MiB to save {num_saves}x, but {free / 2**20:.1f} MiB are "
            f"free in {folder}: make room, or choose another `output_dir`."
        )


@contextmanager
def naming_what_was_not_written(folder: Path, what: str | None = None) -> Iterator[None]:
    """Tell a disk that takes no more from other errors.

    Args:
        folder: what is written inside.
        what: its name in the sentence; the folder's own by default.

    Raises:
        SaveFailed: writing failed.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_the_disk(error):
            raise
        free = _free_bytes(folder) / 2**20
        reason = getattr(error, "strerror", None) or describe(error)
        raise SaveFailed(
            f"since {what or folder.name} could not be written to {folder if what else folder.parent} ({reason}; "
            f"{free:.1f} MiB are free there)"
        ) from error


def _free_bytes(folder: Path) -> int:
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _is_of_the_disk(error: Exception) -> bool:
    """Python's files, safetensors and torch tell it in ways of their own."""
    if isinstance(error, OSError):
        return True
    if isinstance(error, SafetensorError):
        return "I/O error" in str(error)
    return isinstance(error, RuntimeError) and "inline_container" in str(error)


def record_verified(folder: str | Path, num_tensors: int) -> None:
    """Mark a folder as completely saved, with the size in bytes of each of its files; written last."""
    paths = (path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.suffix != ".md")
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    write_text(Path(folder) / SAVE_RECORD, json.dumps({"num_tensors": num_tensors, "files": files}))


def forget_verified(folder: str | Path) -> None:
    """Take the mark back before the folder is written again."""
    (Path(folder) / SAVE_RECORD).unlink(missing_ok=True)


@contextmanager
def replacing_folder(target: Path, is_main_process: bool = True) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on success its files replace those of the same name in `target`.

    On failure nothing in `target` has changed. Other than the main process, ranks get a path and touch nothing.
    """
    if not is_main_process:
        yield target
        return
    with staging_folder(target) as staging:
        yield staging
        target.mkdir(parents=True, exist_ok=True)
        forget_verified(target)
        for path in sorted(staging.iterdir(), key=lambda path: path.name == SAVE_RECORD):
            if path.is_dir():
                shutil.rmtree(target / path.name, ignore_errors=True)
            os.replace(path, target / path.name)
