"""Adapters to checkpoints: one folder with everything in it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from ..files import new_folder
from ..models.standalone import standalone_name
from .card import export_card
from .folders import has_tokenizer
from .headers import ADAPTER_WEIGHTS, MODEL_WEIGHTS, TensorHeaders, is_of_streams
from .published import published_model, published_name, refuse_unpublishable, write_published_config
from .reference import make_reference, write_reference
from .sources import Source, find_source, load_source
from .tensors import TensorFiles, hash_tensor


FORMATS = ("standalone", "published")
DTYPES = ("float32", "bfloat16", "float16")
_REASONS = {
    "gguf": "GGUF has no place for streams, and llama.cpp runs one stream: the engine would have to replicate the "
    "batch, put prefixes before keys and values, and aggregate",
    "vllm": "vLLM serves standalone exports as they are, with the plugin parscale-vllm (docs/serving.md): leave `--format` out",
}


@dataclass
class ExportReport:
    """What an export made."""

    format: str
    num_streams: int
    num_parameters: int
    dtype: str


def export_adapter(
    adapter: str,
    output: Path,
    backbone: str | None = None,
    format: str = "standalone",
    dtype: str | None = None,
    max_shard_size: str = "5GB",
) -> ExportReport:
    """Merge an adapter and its backbone into one checkpoint.

    The files of the backbone are mapped into memory, so that exporting needs memory for the adapter and one shard,
    and for the backbone only if it changes: by `dtype`, by merging LoRA, or if the adapter carries a trained one.

    Args:
        adapter: folder or hub repository of a ParScale adapter.
        output: the new folder.
        backbone: folder or hub repository; the one that the adapter names by default.
        format: `standalone` (any architecture, with the code to load it) or `published` (the authors' layout of
            Qwen2). One stream needs no code, so that `standalone` is then the plain backbone.
        dtype: of the weights, as in the backbone by default.
        max_shard_size: of one file of weights, such as `"2GB"`.

    Raises:
        ValueError: input is missing, damaged or does not fit, the format can't hold it, or the output folder is not
            empty. Nothing is written then.
    """
    _check_choices(format, dtype, max_shard_size)
    with new_folder(output) as staging:
        source = find_source(adapter, backbone)
        if format == "published":
            refuse_unpublishable(source.config, source.model_type)
        model = load_source(source, None if dtype is None else getattr(torch, dtype))
        weights_dtype = model.get_input_embeddings().weight.dtype
        if format == "published":
            _round_parameters(model, weights_dtype)
        reference = make_reference(
            model,
            weights_dtype,
            _hash_streams(source, format, weights_dtype),
            source.config.backbone_fingerprint or {},
            rounds_weights=source.config.lora is not None,
        )
        exported = model.merge_and_unload()
        if format == "published":
            exported = published_model(exported, source.config)
        exported.save_pretrained(staging, max_shard_size=max_shard_size)
        if format == "published":
            write_published_config(exported.config, weights_dtype, staging)
        _write_index(staging)
        write_reference(reference, staging)
        _save_tokenizer(source, staging)
        export_card(source.backbone_name, format, source.config.num_streams).save(staging / "README.md")
        _check_written(exported, staging)
    dtype_name = str(weights_dtype).removeprefix("torch.")
    return ExportReport(format, source.config.num_streams, exported.num_parameters(), dtype_name)


def _check_choices(format: str, dtype: str | None, max_shard_size: str) -> None:
    if format in _REASONS:
        raise ValueError(f"ParScale models can't be exported to {format}: {_REASONS[format]}.")
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}, got {format!r}.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB|TB)", max_shard_size):
        raise ValueError(f"`max_shard_size` must be a number and a unit, such as 2GB, got {max_shard_size!r}.")


@torch.no_grad()
def _round_parameters(model: PeftModel, dtype: torch.dtype) -> None:
    """Let a model compute with what a checkpoint of one dtype holds; what is no wider stays the same tensor."""
    for parameter in model.parameters():
        if parameter.dtype.itemsize > dtype.itemsize:
            parameter.copy_(parameter.to(dtype))


def _hash_streams(source: Source, format: str, dtype: torch.dtype) -> dict[str, str]:
    """Hashes of the streams' tensors, read from the adapter's file, by their names in the export."""
    files = TensorFiles(source.adapter, ADAPTER_WEIGHTS)
    hashes = {}
    for name in filter(is_of_streams, files.shapes):
        exported, tensor = standalone_name(name.removeprefix("base_model.model.")), files.read(name)
        if format == "published":
            hashes[published_name(exported)] = hash_tensor(tensor.to(dtype))
        else:
            hashes[exported] = hash_tensor(tensor.to(torch.promote_types(tensor.dtype, torch.float32)))
    return hashes


def _write_index(folder: Path) -> None:
    """Write the index of the weights also where they are one file.

    Engines such as vLLM read every file of tensors in a folder, the reference's too, unless an index names the weights'.
    """
    path = folder / f"{MODEL_WEIGHTS}.index.json"
    if path.is_file():
        return
    index = {"metadata": {}, "weight_map": dict.fromkeys(sorted(TensorHeaders(folder).shapes), MODEL_WEIGHTS)}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save_tokenizer(source: Source, folder: Path) -> None:
    """Save the tokenizer of the adapter, or else of the backbone, so that it names its class."""
    found = next(filter(has_tokenizer, source.tokenizer_folders), None)
    if found is not None:
        AutoTokenizer.from_pretrained(found).save_pretrained(folder)


def _check_written(model: PreTrainedModel, folder: Path) -> None:
    """Read a checkpoint back.

    Raises:
        ValueError: it does not hold the tensors of the model.
    """
    written, info = type(model).from_pretrained(folder, dtype="auto", output_loading_info=True)
    problems = [
        f"{name} is {kind[:-5]}" for kind in ("missing_keys", "unexpected_keys") for name in sorted(info[kind])
    ]
    state = written.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in state or state[name].dtype != tensor.dtype or not torch.equal(state[name], tensor.cpu()):
            problems.append(f"{name} differs")
    if problems:
        raise ValueError(f"What was written is not what was exported, {'; '.join(problems[:3])}: export again.")
