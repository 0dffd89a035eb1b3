"""Loss on text: the cross-entropy of the next token of whole documents, in nats, as the recipes measure held-out loss."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import PackedCollator, PackedRow, TextSource, content_of, iterate_packed_rows, load_source
from ..data.packing import IGNORED_LABEL
from .bootstrap import ratio_of_sums, resampled
from .measures import Scores
from .settings import EvaluationSettings, named_entries


_KEYS = ("text_field", "split", "config")
LOSS = "loss (nats per token)"


@dataclass(frozen=True)
class TextLoss:
    """Loss on the documents of one source, packed as for training: each sees itself alone.

    Args:
        name: in tables.
        kind: "text", or "forgetting" for text of other kinds than was trained on.
        rows: packed documents.
        num_documents: that they hold.
        identity: what decides them.
        batch_size: rows that run together.
        pad_token_id: fills up the last row.
    """

    name: str
    kind: str
    rows: list[PackedRow]
    num_documents: int
    identity: dict[str, Any]
    batch_size: int
    pad_token_id: int
    generates: bool = False

    def content(self) -> dict[str, Any]:
        """Source, its fingerprint, and how it is packed."""
        return self.identity

    def score(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_beams: int) -> Scores:
        """Loss over all tokens but each document's first; documents are resampled, or rows where there is one alone."""
        losses, tokens, rows = token_losses(model, self.rows, self.batch_size, self.pad_token_id)
        unit = rows if self.num_documents == 1 else tokens
        counted = np.unique(unit)
        sums = np.bincount(unit, losses)[counted]
        counts = np.bincount(unit)[counted].astype(np.float64)
        statistic = ratio_of_sums(sums, counts)
        metric = resampled(losses.mean(), False, len(sums), statistic, self.name)
        what = "row" if self.num_documents == 1 else "document"
        items = [
            {what: int(index), "nats": float(total), "tokens": int(count)}
            for index, total, count in zip(counted, sums, counts)
        ]
        return Scores({LOSS: metric}, items)


def text_losses(settings: EvaluationSettings, tokenizer: PreTrainedTokenizerBase) -> list[TextLoss]:
    """The texts of the settings, tokenized and packed.

    Raises:
        ValueError, TypeError: a source can't be read, or holds no token to predict.
    """
    found = []
    for kind, setting in (("text", "texts"), ("forgetting", "forgetting")):
        for entry in named_entries(getattr(settings, setting), setting, _KEYS):
            found.append(_text_loss(entry, kind, settings, tokenizer))
    return found


def _text_loss(
    entry: dict[str, Any], kind: str, settings: EvaluationSettings, tokenizer: PreTrainedTokenizerBase
) -> TextLoss:
    path = str(Path(entry["path"]).expanduser()) if str(entry["path"]).startswith("~") else str(entry["path"])
    source = TextSource(
        path, entry.get("config"), entry.get("split", "train"), text_field=entry.get("text_field", "text")
    )
    documents = load_source(source)
    if settings.limit is not None:
        documents = documents.select(range(min(settings.limit, len(documents))))
    rows = list(iterate_packed_rows(documents, tokenizer, settings.max_length, path))
    if not any(row.num_tokens_trained for row in rows):
        raise ValueError(
            f"{path} holds no token to predict, its documents are empty: give text for `{entry['name']}`."
        )
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    identity = {
        "text": content_of(source),
        "split": source.split,
        "text_field": source.text_field,
        "max_length": settings.max_length,
        "limit": settings.limit,
    }
    return TextLoss(entry["name"], kind, rows, len(documents), identity, settings.batch_size, pad_token_id)


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, rows: list[PackedRow], batch_size: int, pad_token_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses of all predicted tokens, and which document and which row each belongs to: three arrays `[tokens]`."""
    collate = PackedCollator(pad_token_id)
    losses, documents, row_numbers = [], [], []
    first = 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        inputs = collate([row.to_dict() for row in batch])
        labels = inputs.pop("labels")[:, 1:]
        inputs = {name: value.to(model.device) if hasattr(value, "to") else value for name, value in inputs.items()}
        logits = model(**inputs).logits[:, :-1]
        for index, row in enumerate(batch):
            wanted = labels[index].to(logits.device)
            nats = cross_entropy(logits[index].float(), wanted, ignore_index=IGNORED_LABEL, reduction="none").cpu()
            is_predicted = labels[index] != IGNORED_LABEL
            owners = np.repeat(np.arange(len(row.seq_lengths)), row.seq_lengths)[1:] + first
            losses.append(nats[is_predicted].double().numpy())
            documents.append(owners[is_predicted[: len(owners)].numpy()])
            row_numbers.append(np.full(len(losses[-1]), start + index))
            first += row.num_documents  # the last segment of a row may go on in the next
    return np.concatenate(losses), np.concatenate(documents), np.concatenate(row_numbers)
