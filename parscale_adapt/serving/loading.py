"""What `parscale chat` talks to: a backbone, an export or adapters, loaded once; all is checked before that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.folders import Kind, find_kind, find_tokenizer
from ..checkpoints.headers import ADAPTER_WEIGHTS, TensorHeaders
from ..checkpoints.sources import Source, find_source, load_source
from ..checkpoints.whole import check_backbone_folder, check_model_files
from .conversation import Voice
from .exports import register_classes
from .memory import check_memory


PLAIN = "backbone"
_FIRST_ADAPTER = "default"  # PEFT's name for it


@dataclass
class Speaker:
    """What a path and adapters stand for: a checkpoint, or adapters by name, which share one backbone."""

    kind: Kind
    adapters: dict[str, Source]
    tokenizer_folder: Path

    @property
    def name(self) -> str:
        """Of the backbone, or of what has streams of its own."""
        return self.backbone_folder.resolve().name

    @property
    def backbone_folder(self) -> Path:
        """The folder with the configuration of the model."""
        folders = (source.backbone or source.adapter for source in self.adapters.values())
        return next(folders, self.kind.folder)

    def weight_files(self) -> list[Path]:
        """Files with the weights that are to be loaded; an adapter that brings its backbone counts in its place."""
        headers = [TensorHeaders(source.adapter, ADAPTER_WEIGHTS) for source in self.adapters.values()]
        if not any(source.config.train_backbone for source in self.adapters.values()):
            headers.append(TensorHeaders(self.backbone_folder))
        return sorted({path for header in headers for path in header.files.values()})


def find_speaker(path: str, backbone: str | None = None, adapters: Sequence[str] = ()) -> Speaker:
    """Look at what is to be loaded.

    Args:
        path: folder or hub repository of a backbone, an export, a published checkpoint or an adapter.
        backbone: of an adapter at `path`; the one that it names by default.
        adapters: `NAME=PATH`, or `PATH`, which is then called as its folder.

    Raises:
        ValueError: something is missing or damaged, there is no tokenizer, or they don't go together.
    """
    kind = find_kind(path)
    if kind.name != "adapter":
        check_backbone_folder(kind.folder)
    if kind.owns_streams and adapters:
        raise ValueError(f"{path} has streams of its own, adapters go on a plain backbone: leave --adapter out.")
    if kind.name != "adapter" and backbone is not None:
        raise ValueError(f"{path} is no adapter, so it needs no backbone: leave --backbone out.")
    if kind.name == "adapter":
        adapters = (f"{Path(path).resolve().name}={path}", *adapters)
    else:
        backbone = path
    found: dict[str, Source] = {}
    for adapter in adapters:
        name, separator, place = adapter.partition("=")
        if not separator:
            name, place = Path(adapter).resolve().name, adapter
        if name in ("", PLAIN, *found):
            raise ValueError(f"Each adapter needs a name of its own, got {name!r}: give --adapter NAME=PATH.")
        found[name] = find_source(place, backbone)
        backbone = found[name].backbone_name
    owners = [name for name, source in found.items() if source.config.train_backbone]
    if owners and len(found) > 1:
        raise ValueError(
            f"Adapter {owners[0]!r} brings a backbone of its own, which it can't share: chat with it alone."
        )
    # That of an adapter first, since training may have given it a chat template.
    folders = [folder for source in found.values() for folder in source.tokenizer_folders] or [kind.folder]
    tokenizer_folder = find_tokenizer(folders)
    check_model_files(tokenizer_folder)
    return Speaker(kind, found, tokenizer_folder)


def load_speaker(speaker: Speaker) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, list[Voice]]:
    """Model, tokenizer and voices, the first adapter first. The model is on the GPU if there is one.

    Raises:
        ValueError: something does not fit, together or into memory.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_memory(speaker.name, speaker.weight_files(), device)
    if speaker.kind.owns_streams:
        register_classes(speaker.kind)
    tokenizer = AutoTokenizer.from_pretrained(speaker.tokenizer_folder)
    if speaker.adapters:
        model, voices = _load_adapters(speaker.adapters)
    else:
        model = AutoModelForCausalLM.from_pretrained(speaker.kind.folder, dtype="auto", use_safetensors=True)
        voices = [Voice(speaker.kind.folder.resolve().name, speaker.kind.num_streams)]
    return model.to(device).eval(), tokenizer, voices


def _load_adapters(adapters: Mapping[str, Source]) -> tuple[PeftModel, list[Voice]]:
    model, voices = None, []
    for name, source in adapters.items():
        if model is None:
            model, peft_name = load_source(source), _FIRST_ADAPTER
        else:
            peft_name = f"adapter_{len(voices)}"  # a name with a dot in it is none for PEFT
            model.load_adapter(source.adapter, peft_name, torch_device="cpu")
        voices.append(Voice(name, source.config.num_streams, peft_name))
    assert model is not None
    return model, [*voices, Voice(PLAIN, 1)]
