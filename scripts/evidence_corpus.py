"""The text of the evidence runs: Python that SmolLM2 has not been trained on, and English to see what it forgets.

All of it lies on any machine where this project is installed. Training text is the source of transformers and trl,
held-out text that of peft and accelerate, in releases younger than the model; licence headers are dropped. English is
of three kinds: GSM8K (tests/material), the descriptions of installed packages, and GSM8K in the model's chat template.
A document counts with its first `DOCUMENT_TOKENS` tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from parscale_adapt.files import write_atomically


ROOT = Path(__file__).resolve().parents[1]
TRAIN_PACKAGES = ("transformers", "trl")
HELDOUT_PACKAGES = ("peft", "accelerate")
# Descriptions in English that this project's own dependencies bring along.
DESCRIBED_PACKAGES = (
    "accelerate", "datasets", "huggingface_hub", "matplotlib", "multiprocess", "numpy", "peft", "psutil", "pyarrow",
    "pyyaml", "regex", "requests", "rich", "safetensors", "scipy", "tokenizers", "torch", "tqdm", "trl", "typer",
)  # fmt: skip
DOCUMENT_TOKENS = 512
SHORTEST_DOCUMENT = 128  # tokens
NUM_HELDOUT = 48
NUM_TUNING = 16  # documents on which learning rates are chosen; none of them is held out
NUM_ENGLISH = 16  # documents of each kind
TRAIN_TOKENS = 2**20
_GENERATED = "This file was automatically generated from"
_LICENCE = re.compile(r"licen[cs]e|copyright", re.IGNORECASE)
# A document holds its tokens, then -1 up to its row's end.
NO_TOKEN = -1


@dataclass(frozen=True)
class Corpus:
    """Token ids: `train` `[N]` in one row, every other kind `[documents, DOCUMENT_TOKENS]` ending in -1.

    Attributes:
        fingerprint: sha256 over all tokens, 12 hex digits; rows of a table must share it.
        versions: of the packages whose text this is.
    """

    train: torch.Tensor
    heldout: torch.Tensor
    tuning: torch.Tensor
    english: dict[str, torch.Tensor]
    fingerprint: str
    versions: dict[str, str]


def load_corpus(file: Path, model_folder: Path) -> Corpus:
    """Read the corpus from `file`, which is written first if it isn't there.

    Raises:
        ValueError: a package is missing, or the file has been changed.
    """
    if not file.is_file():
        tensors, versions = _make_corpus(AutoTokenizer.from_pretrained(model_folder))
        file.parent.mkdir(parents=True, exist_ok=True)
        notes = {"fingerprint": _fingerprint(tensors), "versions": json.dumps(versions)}
        write_atomically(file, lambda temporary: save_file(tensors, temporary, metadata=notes))
    with safe_open(file, framework="pt") as opened:
        notes = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dictionary)
    if _fingerprint(tensors) != notes["fingerprint"]:
        raise ValueError(f"The tokens in {file} are not those that were written: delete it, it is made anew.")
    english = {name.removeprefix("english."): rows for name, rows in tensors.items() if name.startswith("english.")}
    return Corpus(
        tensors["train"],
        tensors["heldout"],
        tensors["tuning"],
        english,
        notes["fingerprint"],
        json.loads(notes["versions"]),
    )


def _make_corpus(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    packages = (*TRAIN_PACKAGES, *HELDOUT_PACKAGES)
    versions = {package: installed(package).version for package in packages}
    heldout = list(_documents(tokenizer, package_sources(HELDOUT_PACKAGES)))
    if len(heldout) < NUM_HELDOUT + NUM_TUNING:
        raise ValueError(f"{HELDOUT_PACKAGES} give only {len(heldout)} documents of {SHORTEST_DOCUMENT} tokens.")
    tensors = {
        "train": _training_tokens(tokenizer),
        "heldout": _as_rows(heldout[:NUM_HELDOUT]),
        "tuning": _as_rows(heldout[NUM_HELDOUT : NUM_HELDOUT + NUM_TUNING]),
    }
    for kind, texts in _english(tokenizer).items():
        tensors[f"english.{kind}"] = _as_rows(list(_documents(tokenizer, texts))[:NUM_ENGLISH])
    return tensors, versions


def _training_tokens(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Whole files, one after another with the end token between, until there are enough."""
    ids: list[int] = []
    for text in package_sources(TRAIN_PACKAGES):
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= TRAIN_TOKENS:
            return torch.tensor(ids[:TRAIN_TOKENS], dtype=torch.int32)
    raise ValueError(f"The sources of {TRAIN_PACKAGES} give only {len(ids):,} of {TRAIN_TOKENS:,} tokens.")


def package_sources(packages: Iterable[str]) -> Iterator[str]:
    """Texts of the packages' Python files, in an order drawn by their names' hashes: the same on every machine."""
    files = []
    for package in packages:
        for file in installed(package).files or ():
            if file.suffix == ".py" and file.parts[0] == package:
                files.append((hashlib.sha256(file.as_posix().encode()).hexdigest(), Path(str(file.locate()))))
    for _, path in sorted(files):
        text = path.read_text(encoding="utf-8")
        if _GENERATED not in text:  # transformers' copies of one file for many models
            yield without_licence(text)


def without_licence(text: str) -> str:
    """The text without the comment at its head, if that names a licence or a copyright."""
    lines = text.splitlines(keepends=True)
    head = 0
    while head < len(lines) and (lines[head].startswith("#") or not lines[head].strip()):
        head += 1
    return "".join(lines[head:]) if _LICENCE.search("".join(lines[:head])) else text


def _english(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
    lines = (ROOT / "tests" / "material" / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    half = len(rows) // 2  # two kinds share no question
    plain = [f"{row['question']}\n{row['answer']}" for row in rows[:half]]
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}],
            tokenize=False,
        )
        for row in rows[half:]
    ]
    descriptions = [str(installed(name).metadata.get_payload()) for name in DESCRIBED_PACKAGES]
    return {"gsm8k": plain, "documentation": descriptions, "chat": chats}


def _documents(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[list[int]]:
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:DOCUMENT_TOKENS]
        if len(ids) >= SHORTEST_DOCUMENT:
            yield ids


def _as_rows(documents: list[list[int]]) -> torch.Tensor:
    rows = torch.full((len(documents), DOCUMENT_TOKENS), NO_TOKEN, dtype=torch.int32)
    for row, document in zip(rows, documents):
        row[: len(document)] = torch.tensor(document, dtype=torch.int32)
    return rows


def _fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()[:12]


def installed(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise ValueError(f"The package {name}, whose text the evidence runs use, isn't installed.") from error
