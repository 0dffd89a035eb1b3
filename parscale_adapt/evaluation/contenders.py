"""Who is scored: a backbone, adapters on it, and the backbone with beam search. Checked before weights are read.

Adapters that were trained on a frozen backbone share it in memory and are switched. An adapter that brings a trained
backbone of its own is loaded when its turn comes, when the others are gone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.belonging import check_belonging
from ..checkpoints.folders import ADAPTER_CONFIG, find_kind, has_tokenizer
from ..checkpoints.headers import ADAPTER_WEIGHTS, MODEL_WEIGHTS, TensorHeaders
from ..checkpoints.sources import Source, find_source, load_backbone, load_source
from ..checkpoints.whole import check_adapter_folder, check_backbone_folder, check_model_files
from ..data import fingerprint_of_files
from .settings import EvaluationSettings, named_entries


PLAIN = "backbone"
_TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "chat_template*")


@dataclass(frozen=True)
class Contender:
    """A model that is scored.

    Args:
        name: in tables.
        num_streams: P.
        num_beams: with which it answers; 1 is greedy.
        source: its adapter; None for the backbone.
        content: fingerprints of what decides its answers.
    """

    name: str
    num_streams: int
    num_beams: int
    source: Source | None
    content: dict[str, Any]

    @property
    def owns_backbone(self) -> bool:
        """Whether it brings a backbone of its own, which no other can share."""
        return self.source is not None and self.source.config.train_backbone


@dataclass(frozen=True)
class Field:
    """All contenders, the backbone first, with the tokenizer that they share."""

    backbone: Path
    contenders: list[Contender]
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype | None


def find_field(settings: EvaluationSettings) -> Field:
    """Look at backbone, adapters and tokenizer without reading weights.

    Raises:
        ValueError: something is missing or damaged, an adapter belongs to another backbone, two have one name, or there
            is no tokenizer or chat template.
    """
    if settings.backbone is None:
        raise ValueError("No `backbone` is named: give the folder or hub name of a plain causal LM.")
    kind = find_kind(settings.backbone)
    if kind.name != "plain":
        raise ValueError(
            f"`backbone` must be a plain checkpoint, got {settings.backbone}, which is {kind.name}: name the plain one, and "
            "adapters under `adapters`."
        )
    check_backbone_folder(kind.folder)
    sources = {}
    for entry in named_entries(settings.adapters, "adapters", ()):
        source = find_source(str(Path(entry["path"]).expanduser()), settings.backbone)
        check_adapter_folder(source.adapter)
        if source.backbone is not None:
            config = AutoConfig.from_pretrained(source.backbone)
            check_belonging(source.adapter, source.config, source.backbone, config)
        sources[entry["name"]] = source
    if PLAIN in sources:
        raise ValueError(f"An adapter can't be called {PLAIN!r}, as the backbone is: give NAME=PATH.")
    tokenizer, tokenizer_folder = _load_tokenizer(kind.folder, [*sources.values()], settings.apply_chat_template)
    common = {
        "backbone": fingerprint_of_files([kind.folder / "config.json", *_weights(kind.folder, MODEL_WEIGHTS)]),
        "tokenizer": fingerprint_of_files(_matching(tokenizer_folder, _TOKENIZER_FILES)),
        "dtype": settings.dtype,
    }
    field = [Contender(PLAIN, 1, 1, None, common)]
    for number in sorted(settings.beams):
        field.append(Contender(f"{number} beams", 1, number, None, common | {"num_beams": number}))
    for name, source in sources.items():
        files = [source.adapter / ADAPTER_CONFIG, *_weights(source.adapter, ADAPTER_WEIGHTS)]
        content = common | {"adapter": fingerprint_of_files(files)}
        field.append(Contender(name, source.config.num_streams, 1, source, content))
    if len({one.name for one in field}) < len(field):
        raise ValueError(f"An adapter can't be called as a number of beams is: give NAME=PATH, got {[*sources]}.")
    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return Field(kind.folder, field, tokenizer, dtype)


def _load_tokenizer(
    backbone: Path, sources: Sequence[Source], needs_template: bool
) -> tuple[PreTrainedTokenizerBase, Path]:
    """The backbone's, else the first that came with an adapter; with a chat template where one is needed."""
    folders = [folder for folder in (backbone, *(source.adapter for source in sources)) if has_tokenizer(folder)]
    for folder in folders:
        check_model_files(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if not needs_template or tokenizer.chat_template is not None:
            return tokenizer, folder
    if not folders:
        raise ValueError(f"There is no tokenizer in {backbone}: copy tokenizer.json and tokenizer_config.json there.")
    raise ValueError(
        f"`apply_chat_template` needs a tokenizer with a chat template, and that of {folders[0]} has none: leave it out."
    )


def _weights(folder: Path, name: str) -> list[Path]:
    return sorted({*TensorHeaders(folder, name).files.values()})


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


@contextmanager
def resident(field: Field, contenders: Sequence[Contender]) -> Iterator["Resident"]:
    """Inside, contenders that can share one backbone are loaded, on the GPU if there is one.

    Raises:
        ValueError: a backbone lacks tensors, or does not fit an adapter.
    """
    adapters = {one.name: one.source for one in contenders if one.source is not None}
    model: PreTrainedModel | PeftModel | None = None
    names: dict[str, str] = {}
    for name, source in adapters.items():
        names[name] = f"adapter_{len(names)}" if names else "default"  # a name with a dot in it is none for PEFT
        if model is None:
            model = load_source(source, field.dtype)
        else:
            model.load_adapter(source.adapter, names[name], torch_device="cpu")
    model = load_backbone(field.backbone, field.dtype) if model is None else model
    yield Resident(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), names)


@dataclass(frozen=True)
class Resident:
    """A model in memory, and PEFT's names of the adapters on it."""

    model: PreTrainedModel | PeftModel
    names: dict[str, str]

    @contextmanager
    def playing(self, contender: Contender) -> Iterator[None]:
        """Inside, the model is this contender."""
        if contender.source is not None:
            self.model.set_adapter(self.names[contender.name])
            self.model.eval()
            yield
        elif self.names:
            with self.model.disable_adapter():
                yield
        else:
            yield


def shared_loads(contenders: Sequence[Contender]) -> list[list[Contender]]:
    """Contenders that are loaded together: all that share the backbone, then each that brings its own."""
    sharing = [one for one in contenders if not one.owns_backbone]
    return [group for group in (sharing, *([one] for one in contenders if one.owns_backbone)) if group]
