"""Reference logits: what a model computes for a fixed prompt, kept beside its weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..version import __version__
from .folders import TensorFiles


REFERENCE_FILE = "reference_logits.safetensors"
_NUM_TOKENS = 16
# As shares of the largest logit; other machines and kernels round in another order.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass
class Reference:
    """A prompt `[1, T]` of token ids and its logits `[1, T, vocabulary]`, which may differ by `tolerance`."""

    input_ids: torch.Tensor
    logits: torch.Tensor
    tolerance: float
    made_by: str
    backbone_fingerprint: dict[str, str]


@torch.no_grad()
def compute_logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits `[B, T, vocabulary]` in float32 of `input_ids` `[B, T]`."""
    return model(input_ids=input_ids.to(model.device), use_cache=False).logits.float().cpu()


def make_reference(model: PreTrainedModel, dtype: torch.dtype, backbone_fingerprint: dict[str, str]) -> Reference:
    """The reference of a model whose weights are held in `dtype`."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    input_ids = torch.randint(vocab_size, (1, _NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    logits = compute_logits(model, input_ids)
    tolerance = _TOLERANCES[dtype] * float(logits.abs().max())
    return Reference(input_ids, logits, tolerance, __version__, backbone_fingerprint)


def write_reference(reference: Reference, folder: Path) -> None:
    """Write the file that [`read_reference`] reads."""
    metadata = {
        "format": "pt",
        "tolerance": repr(reference.tolerance),
        "made_by": reference.made_by,
        "backbone_fingerprint": json.dumps(reference.backbone_fingerprint),
    }
    tensors = {"input_ids": reference.input_ids, "logits": reference.logits}
    save_file(tensors, folder / REFERENCE_FILE, metadata=metadata)


def read_reference(folder: Path) -> Reference:
    """The reference of an exported checkpoint.

    Raises:
        ValueError: it has none, or the file is damaged.
    """
    if not (folder / REFERENCE_FILE).is_file():
        raise ValueError(
            f"{folder} holds no {REFERENCE_FILE}, so there is nothing to compare with: give a folder that "
            "`parscale export` made."
        )
    tensors = TensorFiles(folder, REFERENCE_FILE)
    with safe_open(folder / REFERENCE_FILE, "pt") as reader:
        metadata: dict[str, Any] = reader.metadata() or {}
    if not {"input_ids", "logits"} <= tensors.shapes.keys() or "tolerance" not in metadata:
        raise ValueError(f"{folder / REFERENCE_FILE} is damaged: it lacks the prompt, the logits or their tolerance.")
    return Reference(
        tensors.read("input_ids"),
        tensors.read("logits"),
        float(metadata["tolerance"]),
        metadata["made_by"],
        json.loads(metadata["backbone_fingerprint"]),
    )
