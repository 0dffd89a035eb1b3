"""What a recipe would make of some data: a look at its first rows, by the functions that the recipes use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from typing import Any

from rich.panel import Panel
from transformers import PreTrainedTokenizerBase

from .conversations import is_instruction_row
from .inspection import show_prepared
from .instruction_rows import InstructionRow, InstructionSettings, RowPreparer
from .instructions import columns_of, place_of
from .packing import pack_documents
from .row_files import RowError
from .sources import DataSource, TextSource, is_json_rows, load_rows, load_source
from .tokenization import iterate_encoded
from .tokenizer_training import train_tokenizer


SFT, CPT = "sft.py", "cpt.py"


@dataclass(frozen=True)
class PreviewSettings:
    """How to look at data.

    Args:
        instructions: how questions and answers become token ids.
        text_field: column of raw text.
        num_rows: rows to look at, from the first.
        recipe: the one to look for; None finds out which of the two reads the rows.
    """

    instructions: InstructionSettings
    text_field: str = "text"
    num_rows: int = 1000
    recipe: str | None = None


@dataclass
class Preview:
    """What was found.

    Args:
        name: of the data.
        recipe: the script that reads it.
        format: of its rows, in words.
        lengths: tokens of each row, before anything is cut.
        num_trained: tokens that are a target.
        num_cut, num_dropped: rows longer than `max_length` that lose their end, or all that could be trained.
        unused: columns and fields that are not read, with the number of rows that have them.
        problems: why rows can't be used, each with its place.
        example: the first row as the model sees it.
    """

    name: str
    recipe: str
    format: str = ""
    lengths: list[int] = field(default_factory=list)
    num_trained: int = 0
    num_cut: int = 0
    num_dropped: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    example: Panel | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name,
            "recipe": self.recipe,
            "format": self.format,
            "rows": len(self.lengths) + len(self.problems),
            "tokens": sum(self.lengths),
            "tokens_trained": self.num_trained,
            "tokens_per_row": None
            if not self.lengths
            else [min(self.lengths), median(self.lengths), max(self.lengths)],
            "rows_cut": self.num_cut,
            "rows_dropped": self.num_dropped,
            "not_read": dict(self.unused),
            "problems": self.problems,
        }


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of bytes, to count with where none is named."""
    return train_tokenizer(["a"], 259)


def preview(source: DataSource, tokenizer: PreTrainedTokenizerBase, settings: PreviewSettings) -> Preview:
    """Look at the first rows of some data.

    Args:
        source: the data.
        tokenizer: has an end token and, for questions and answers, a chat template.
        settings: how.

    Raises:
        ValueError: the data can't be opened.
    """
    rows = load_rows(source)
    first = next(iter(rows), None)
    if first is None:
        raise ValueError(f"{source.path} has no rows in the split {source.split!r}: give data with at least one.")
    fields = (settings.instructions.prompt_field, settings.instructions.completion_field)
    is_json = is_json_rows(rows)
    found = SFT if is_instruction_row(columns_of(first, is_json), fields) else CPT
    seen = Preview(source.label, settings.recipe or found)
    if seen.recipe == CPT:
        _look_at_text(seen, source, tokenizer, settings)
        return seen
    preparer = RowPreparer(tokenizer, settings.instructions)
    try:
        for index, example in enumerate(islice(rows, settings.num_rows)):
            row = preparer.prepare(columns_of(example, is_json), not is_json)
            _add_row(seen, row, place_of(example, index, source.label, is_json), tokenizer, settings)
    except RowError as error:
        seen.problems.append(str(error))
    return seen


def _add_row(
    seen: Preview, row: InstructionRow, place: str, tokenizer: PreTrainedTokenizerBase, settings: PreviewSettings
) -> None:
    if row.problem is not None:
        seen.problems.append(f"{place}: {row.problem}.")
        return
    limit = settings.instructions.max_length
    is_long = limit is not None and row.num_tokens > limit
    seen.format = seen.format or row.format
    seen.lengths.append(row.num_tokens)
    seen.num_trained += row.num_trained
    seen.num_dropped += row.num_trained == 0
    seen.num_cut += is_long and row.num_trained > 0
    seen.unused.update(row.unused)
    if seen.example is None and row.num_trained:
        seen.example = show_prepared({"input_ids": row.input_ids, "labels": row.labels}, tokenizer, place)


def _look_at_text(
    seen: Preview, source: DataSource, tokenizer: PreTrainedTokenizerBase, settings: PreviewSettings
) -> None:
    seen.format = f"raw text in `{settings.text_field}`"
    text = TextSource(
        source.path, source.name, source.split, source.streaming, source.encoding, text_field=settings.text_field
    )
    documents: list[list[int]] = []
    try:
        encoded: Iterable[list[int]] = iterate_encoded(load_source(text), tokenizer, source.label)
        for document in islice(encoded, settings.num_rows):
            documents.append(document)
    except (RowError, TypeError, ValueError) as error:
        seen.problems.append(str(error))
    seen.lengths = [len(document) for document in documents]
    seen.num_trained = sum(length - 1 for length in seen.lengths)
    row = next(pack_documents(documents, settings.instructions.max_length or max(seen.lengths, default=2)), None)
    if row is not None:
        seen.example = show_prepared(row.to_dict(), tokenizer, f"{source.label}, packed")
