"""What an export is compared with: logits of its source for fixed prompts, and hashes of its streams' tensors.

Logits are computed twice, as the weights are held, and, where that is half precision, in float32 too: its rounding is
hundreds of times smaller than what a damaged stream does, which half precision may hide. How far they may be off is
measured on the source: as many times as [`_MARGIN`] says the difference between a dtype and the next wider one, over
all prompts, which is as large as that between two kernels, two batch sizes or two machines.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..version import __version__
from .fresh_process import LOGITS, compute_logits, split_batches
from .headers import REFERENCE_FILE
from .tensors import TensorFiles


# Lengths of the rows of each batch. Attention takes another way for a row without padding, for up to 16 tokens behind
# padding, and for more.
_BATCHES = {"": (16,), "short.": (7, 4, 2), "long.": (20, 9)}
_NUM_COMPARED = 3  # last tokens of a row, to keep the file small
_MARGIN = 8


@dataclass
class Reference:
    """The contents of a reference file.

    Args:
        tensors: prompts and logits, see [`parscale_adapt.checkpoints.fresh_process`].
        tolerances: largest allowed difference of logits, by the end of their names.
        stream_tensors: hashes of the export's tensors, by name; None in exports of version 0.1.0.
        made_by: version of this package.
        backbone_fingerprint: of the backbone of the source.
    """

    tensors: dict[str, torch.Tensor]
    tolerances: dict[str, float]
    stream_tensors: dict[str, str] | None
    made_by: str
    backbone_fingerprint: dict[str, str]


def make_prompts(vocab_size: int) -> dict[str, torch.Tensor]:
    """Random prompts in batches, padded on the left, by their names in a reference file."""
    generator = torch.Generator().manual_seed(0)
    prompts = {}
    for beginning, lengths in _BATCHES.items():
        shape = len(lengths), max(lengths)
        from_the_end = torch.arange(shape[1]).flip(0)
        is_token = from_the_end < torch.tensor(lengths)[:, None]
        prompts[f"{beginning}input_ids"] = torch.randint(vocab_size, shape, generator=generator) * is_token
        prompts[f"{beginning}compared"] = is_token & (from_the_end < _NUM_COMPARED)
        if not is_token.all():
            prompts[f"{beginning}attention_mask"] = is_token.long()
    return prompts


def make_reference(
    model: PreTrainedModel,
    dtype: torch.dtype,
    stream_tensors: Mapping[str, str],
    backbone_fingerprint: Mapping[str, str],
    rounds_weights: bool = False,
) -> Reference:
    """The reference of a model whose weights are held in `dtype`.

    Args:
        model: the source.
        dtype: of its weights.
        stream_tensors, backbone_fingerprint: see [`Reference`].
        rounds_weights: whether the export rounds weights that the source computes with, so that its logits are off by
            as much as `dtype` rounds even where float32 computes them.

    Raises:
        ValueError: logits of the model are infinite or no numbers.
    """
    prompts = make_prompts(model.get_input_embeddings().weight.shape[0])
    kinds = {end: width or dtype for end, width in LOGITS.items() if width is not dtype}
    tensors, roundings = dict(prompts), dict.fromkeys(kinds, 0.0)
    for beginning, batch in split_batches(prompts).items():
        widths = [*kinds.values(), torch.float64]
        in_each = [compute_logits(model, batch, None if width is dtype else width) for width in widths]
        for kind, logits, wider in zip(kinds, in_each, in_each[1:]):
            tensors[beginning + kind] = logits
            roundings[kind] = max(roundings[kind], float((logits.double() - wider.double()).abs().max()))
    if not all(tensors[name].isfinite().all() for name in tensors):
        raise ValueError(
            f"`dtype` must be one that holds the numbers of this model, got {dtype}, in which its logits are infinite or "
            "no numbers: export in float32 or bfloat16."
        )
    if rounds_weights:
        roundings = dict.fromkeys(kinds, max(roundings.values()))
    tolerances = {kind: _MARGIN * rounding for kind, rounding in roundings.items()}
    return Reference(tensors, tolerances, dict(stream_tensors), __version__, dict(backbone_fingerprint))


def write_reference(reference: Reference, folder: Path) -> None:
    """Write the file that [`read_reference`] reads."""
    metadata = {
        "format": "pt",
        "tolerances": json.dumps(reference.tolerances),
        "stream_tensors": json.dumps(reference.stream_tensors),
        "made_by": reference.made_by,
        "backbone_fingerprint": json.dumps(reference.backbone_fingerprint),
    }
    save_file(reference.tensors, folder / REFERENCE_FILE, metadata=metadata)


def read_reference(folder: Path) -> Reference:
    """The reference of an exported checkpoint.

    Exports of version 0.1.0 hold one prompt, with one tolerance, and no hashes.

    Raises:
        ValueError: it has none, or the file is damaged.
    """
    path = folder / REFERENCE_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {REFERENCE_FILE}, so there is nothing to compare with: give a folder that "
            "`parscale export` made."
        )
    files = TensorFiles(folder, REFERENCE_FILE)
    metadata = files.metadata
    if not {"input_ids", "logits"} <= files.shapes.keys() or not metadata.keys() & {"tolerance", "tolerances"}:
        raise ValueError(
            f"{path} is damaged, it lacks the prompts, the logits or their tolerance: copy or download it again."
        )
    tolerances = (
        {"logits": float(metadata["tolerance"])} if "tolerance" in metadata else json.loads(metadata["tolerances"])
    )
    return Reference(
        {name: files.read(name) for name in files.shapes},
        tolerances,
        json.loads(metadata.get("stream_tensors", "null")),
        metadata["made_by"],
        json.loads(metadata["backbone_fingerprint"]),
    )
