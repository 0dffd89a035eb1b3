"""Question and answer data as rows of token ids: prepared, counted, and refused where a row can't be trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from .instruction_rows import InstructionSettings, RowPreparer
from .report import TokenReport
from .saying import say
from .sources import is_json_rows


# Part of the name under which prepared rows are cached; a change of how they are prepared changes it.
_PREPARATION_VERSION = "1"
INSTRUCTION_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
_COUNTS = ("num_tokens", "num_trained")
_PREPARED_FEATURES = Features(
    {
        **INSTRUCTION_FEATURES,
        **dict.fromkeys(_COUNTS, Value("int32")),
        "problem": Value("string"),
        "unused": List(Value("string")),
        "lost_prompt": Value("string"),
    }
)


@dataclass(frozen=True)
class _Preparation:
    """What `Dataset.map` runs on each row; its fields name the cached result."""

    preparer: RowPreparer
    name: str
    is_json: bool
    version: str

    def __call__(self, example: Mapping[str, Any], index: int) -> dict[str, Any]:
        prepared = self.preparer.prepare(columns_of(example, self.is_json), not self.is_json)
        problem = prepared.problem and f"{place_of(example, index, self.name, self.is_json)}: {prepared.problem}."
        return {
            "input_ids": prepared.input_ids,
            "labels": prepared.labels,
            "num_tokens": prepared.num_tokens,
            "num_trained": prepared.num_trained,
            "problem": problem,
            "unused": list(prepared.unused),
            "lost_prompt": prepared.lost_prompt,
        }


def columns_of(example: Mapping[str, Any], is_json: bool) -> Mapping[str, Any]:
    """The columns of a row of [`parscale_adapt.data.sources.load_rows`]."""
    return json.loads(example["row"]) if is_json else example


def place_of(example: Mapping[str, Any], index: int, name: str, is_json: bool) -> str:
    """Where a row stands, for errors; rows count from 1."""
    return example["place"] if is_json else f"{name}, row {index + 1}"


def prepare_instructions(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: InstructionSettings,
    name: str,
    num_processes: int | None = None,
) -> tuple[Dataset, TokenReport]:
    """Make rows of token ids and labels of question and answer data.

    Rows without a target within `settings.max_length` tokens are dropped; that, what is cut, and columns that are not
    read are told on screen.

    Args:
        dataset: rows as [`parscale_adapt.data.sources.load_rows`] gives them.
        tokenizer: has a chat template and an end token.
        settings: how.
        name: of the data, for errors and for the report.
        num_processes: to prepare with; None is this one.

    Returns:
        The rows (`INSTRUCTION_FEATURES`), and what was read, trained, cut and dropped in one pass over them.

    Raises:
        ValueError: a row can't be trained, or none has a target.
    """
    is_json = is_json_rows(dataset)
    preparation = _Preparation(RowPreparer(tokenizer, settings), name, is_json, _PREPARATION_VERSION)
    prepared = dataset.map(
        preparation,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=_PREPARED_FEATURES,
        num_proc=num_processes,
        desc=f"Preparing {name}",
    )
    refuse_problems(prepared)
    tell_unused(prepared, name)
    _tell_lost_prompts(prepared, name)
    num_tokens, num_trained = (np.asarray(_column(prepared, count)) for count in _COUNTS)
    report = _report(name, num_tokens, num_trained, settings.max_length)
    kept = np.flatnonzero(num_trained)
    rows = prepared.select_columns(list(INSTRUCTION_FEATURES))
    return rows if len(kept) == len(rows) else rows.select(kept), report


def _column(dataset: Dataset, name: str) -> pyarrow.ChunkedArray:
    return dataset.select_columns([name]).with_format("arrow")[:][name]


def refuse_problems(prepared: Dataset) -> None:
    """Raises ValueError where a prepared row has a `problem`."""
    problems = _column(prepared, "problem").drop_null()
    if len(problems):
        others = f" {len(problems) - 1:,} more rows can't be used either." if len(problems) > 1 else ""
        raise ValueError(f"{problems[0].as_py()}{others}")


def tell_unused(prepared: Dataset, name: str) -> None:
    """Say which columns and fields were not read, by the column `unused`."""
    unused = sorted(pyarrow.compute.list_flatten(_column(prepared, "unused")).unique().to_pylist())
    if unused:
        say(f"{name}: not read, and not trained on: {', '.join(unused)}.")


def _tell_lost_prompts(prepared: Dataset, name: str) -> None:
    for lost in sorted(set(_column(prepared, "lost_prompt").unique().to_pylist()) - {""}):
        say(
            f"{name}: generation is prompted with {lost[-40:]!r}, which the chat template leaves out where an answer "
            "follows, so the model won't have seen it."
        )


def _report(name: str, num_tokens: np.ndarray, num_trained: np.ndarray, max_length: int | None) -> TokenReport:
    limit = int(num_tokens.max()) if max_length is None else max_length
    is_dropped = num_trained == 0
    is_cut = (num_tokens > limit) & ~is_dropped
    for what, rows in (("dropped", is_dropped), ("cut", is_cut)):
        if rows.any():
            say(f"{name}: {rows.sum():,} of {len(rows):,} rows {what}: longer than {limit:,} tokens.")
    if is_dropped.all():
        raise ValueError(
            f"{name}: none of {len(num_tokens):,} rows has an answer to train on within `max_length` {limit}: give a larger "
            "one, or shorter rows."
        )
    report = TokenReport([name], is_one_pass=True)
    report.add(
        0,
        documents=len(num_tokens),
        documents_cut=int(is_cut.sum()),
        documents_dropped=int(is_dropped.sum()),
        tokens_read=int(num_tokens.sum()),
        tokens_trained=int(num_trained.sum()),
        tokens_cut=int((num_tokens - limit)[is_cut].sum()),
        tokens_dropped=int(num_tokens[is_dropped].sum()),
        epochs=1,
    )
    return report
