"""Published checkpoints to PEFT adapters, tensor by tensor."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from ..files import new_folder
from ..hf.fingerprint import backbone_fingerprint
from ..models.qwen2_parscale import Qwen2ParScaleConfig
from ..tuner.config import ParScaleConfig
from ..tuner.state import check_complete
from .card import adapter_card
from .folders import find_kind
from .headers import ADAPTER_WEIGHTS
from .published import backbone_config, name_in_adapter, published_shapes
from .tensors import TensorFiles


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass
class BackboneComparison:
    """How the backbone inside a published checkpoint compares with a backbone of its own.

    `different` names the tensors that are farther apart than the tolerance; `largest_difference` is over all tensors.
    """

    num_tensors: int = 0
    num_identical: int = 0
    largest_difference: float = 0.0
    different: list[str] = field(default_factory=list)


@dataclass
class ImportReport:
    """What an import made: an adapter of `num_streams` streams, which `carries_backbone` or needs one."""

    num_streams: int
    num_prefix_tokens: int
    num_tensors: int
    carries_backbone: bool
    comparison: BackboneComparison | None


def import_published(source: str, output: Path, backbone: str | None = None, tolerance: float = 0.0) -> ImportReport:
    """Turn a published checkpoint into a PEFT adapter.

    Args:
        source: folder or hub repository in the published layout.
        output: the new folder.
        backbone: folder or hub repository of the plain Qwen2 that the adapter shall run on. Without it, and where the
            checkpoint's own backbone differs from it, the adapter carries the checkpoint's backbone.
        tolerance: largest absolute difference of two weights that still count as equal; 0 asks for equal values.

    Raises:
        ValueError: the source is no published checkpoint, is damaged or incomplete, the backbone has other shapes, or
            the output folder is not empty.
    """
    with new_folder(output) as staging:
        config, tensors = open_published(source)
        ours = sorted(name for name in tensors.shapes if name != name_in_adapter(name))
        comparison = None
        if backbone is None:
            keeps_backbone, fingerprint = True, _shape_fingerprint(config)
        else:
            plain = open_backbone(backbone, config)
            comparison = compare_backbones(tensors, plain, tolerance, skip=ours)
            keeps_backbone, fingerprint = bool(comparison.different), _fingerprint(plain.folder)
        names = [name for name in published_shapes(config) if keeps_backbone or name in ours]
        _adapter_config(config, keeps_backbone, fingerprint, backbone).save_pretrained(str(staging))
        if keeps_backbone:
            backbone_config(config).save_pretrained(staging)
        _write_adapter(tensors, names, staging)
        _copy_tokenizer(tensors.folder, staging)
        adapter_card(source, backbone, config.parscale_n).save(staging / "README.md")
    return ImportReport(config.parscale_n, config.parscale_n_tokens, len(names), keeps_backbone, comparison)


def open_published(source: str) -> tuple[Qwen2ParScaleConfig, TensorFiles]:
    """Configuration and tensors of a published checkpoint, a folder or hub repository.

    Raises:
        ValueError: it is another kind of checkpoint, damaged, or its tensors are not those that its configuration
            asks for.
    """
    kind = find_kind(source)
    if kind.name != "published":
        raise ValueError(
            f"{source} must hold a published ParScale checkpoint, got one of the model type "
            f"{kind.config.get('model_type')!r}: give another."
        )
    config = Qwen2ParScaleConfig.from_pretrained(kind.folder)
    tensors = TensorFiles(kind.folder)
    _check_tensors(tensors, published_shapes(config), config)
    return config, tensors


def open_backbone(source: str, published: Qwen2ParScaleConfig) -> TensorFiles:
    """The tensors of a plain Qwen2 of the same shape, in a folder or hub repository.

    Raises:
        ValueError: it is another kind of model, damaged, or of another shape.
    """
    kind = find_kind(source)
    model_type = kind.config.get("model_type")
    if kind.name != "plain" or model_type != Qwen2Config.model_type:
        raise ValueError(
            f"The backbone must be a plain checkpoint of the model type 'qwen2', got {source}, a {kind.name} one of the "
            f"type {model_type!r}: give another."
        )
    tensors = TensorFiles(kind.folder)
    shapes = {name: shape for name, shape in published_shapes(published).items() if name == name_in_adapter(name)}
    _check_tensors(tensors, shapes, Qwen2Config.from_pretrained(kind.folder))
    return tensors


def _check_tensors(tensors: TensorFiles, expected: dict[str, tuple[int, ...]], config: Qwen2Config) -> None:
    """Names and shapes must be the expected ones; a tied LM head may stand in the file, if it is the embedding."""
    found = {name: torch.empty(shape, device="meta") for name, shape in tensors.shapes.items()}
    if config.tie_word_embeddings and _LM_HEAD in found:
        del found[_LM_HEAD]
        if not torch.equal(tensors.read(_LM_HEAD), tensors.read(_EMBEDDING)):
            raise ValueError(
                f"{tensors.folder} says that its embeddings are tied, but {_LM_HEAD} differs from them: set "
                "`tie_word_embeddings` in its config.json to what it was trained with."
            )
    check_complete(found, expected, str(tensors.folder))


def compare_backbones(
    tensors: TensorFiles, plain: TensorFiles, tolerance: float, skip: list[str]
) -> BackboneComparison:
    """Compare the tensors of a checkpoint, but for those to `skip`, with those of the same names in a backbone."""
    comparison = BackboneComparison()
    for name in sorted(plain.shapes.keys() & tensors.shapes.keys() - set(skip)):
        ours, theirs = tensors.read(name), plain.read(name)
        comparison.num_tensors += 1
        if ours.dtype == theirs.dtype and torch.equal(ours, theirs):
            comparison.num_identical += 1
            continue
        difference = float((ours.float() - theirs.float()).abs().max())
        comparison.largest_difference = max(comparison.largest_difference, difference)
        if difference == 0:
            comparison.num_identical += 1
        elif not difference <= tolerance:
            comparison.different.append(name)
    return comparison


def _fingerprint(folder: Path) -> dict[str, str]:
    return backbone_fingerprint(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))  # mapped, not copied


def _shape_fingerprint(config: Qwen2ParScaleConfig) -> dict[str, str]:
    """Of the shape alone, since the adapter brings the weights."""
    with torch.device("meta"):
        return backbone_fingerprint(AutoModelForCausalLM.from_config(backbone_config(config)))


def _adapter_config(
    config: Qwen2ParScaleConfig, keeps_backbone: bool, fingerprint: dict[str, str], backbone: str | None
) -> ParScaleConfig:
    attention = [f"model.layers.{index}.self_attn" for index in range(config.num_hidden_layers)]
    return ParScaleConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=backbone,
        num_streams=config.parscale_n,
        num_prefix_tokens=config.parscale_n_tokens,
        aggregator_smoothing=config.parscale_attn_smooth,
        train_backbone=keeps_backbone,
        target_modules=("model", *attention) if config.parscale_n > 1 else None,
        backbone_fingerprint=fingerprint,
    )


def _write_adapter(tensors: TensorFiles, names: list[str], folder: Path) -> None:
    """Write the adapter file and read it back.

    Raises:
        ValueError: what is read back differs.
    """
    renamed = {f"base_model.model.{name_in_adapter(name)}": name for name in names}
    state = {new: tensors.read(name) for new, name in renamed.items()}
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    written = TensorFiles(folder, ADAPTER_WEIGHTS)
    for new, name in renamed.items():
        if new not in written.shapes or not torch.equal(written.read(new), tensors.read(name)):
            raise ValueError(f"What was written to {folder} is not what was read, {new} differs: import again.")


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
