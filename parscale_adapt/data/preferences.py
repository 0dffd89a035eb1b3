"""Preference pairs as rows of token ids: a question with a better and a worse answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from .instruction_rows import InstructionRow, InstructionSettings, RowPreparer
from .instructions import columns_of, place_of, refuse_problems, tell_unused
from .messages import ANSWER
from .packing import IGNORED_LABEL
from .report import TokenReport
from .row_files import RowError
from .saying import say
from .sources import is_json_rows


_PREPARATION_VERSION = "2"  # part of the name under which prepared pairs are cached
PREFERENCE_FEATURES = Features({name: List(Value("int32")) for name in ("prompt_ids", "chosen_ids", "rejected_ids")})
_SHARED = ("tools", "chat_template_kwargs", "system")  # columns that both answers of a row have
_PREPARED_FEATURES = Features({**PREFERENCE_FEATURES, "problem": Value("string"), "unused": List(Value("string"))})


@dataclass(frozen=True)
class PreferenceSettings:
    """How pairs become token ids.

    Args:
        max_length: tokens of a question with an answer; longer pairs are left out. None leaves none out.
        prompt_field, chosen_field, rejected_field: their columns.
        end_token_ids: tokens at which generation stops.
    """

    max_length: int | None
    prompt_field: str = "prompt"
    chosen_field: str = "chosen"
    rejected_field: str = "rejected"
    end_token_ids: frozenset[int] = frozenset()

    @property
    def answer_fields(self) -> tuple[str, str]:
        """Of the better and of the worse answer."""
        return self.chosen_field, self.rejected_field


@dataclass(frozen=True)
class _Preparation:
    """What `Dataset.map` runs on each pair; its fields name the cached result."""

    preparer: RowPreparer
    settings: PreferenceSettings
    name: str
    is_json: bool
    version: str

    def __call__(self, example: Mapping[str, Any], index: int) -> dict[str, Any]:
        try:
            row = columns_of(example, self.is_json)
            pair, unused = self._pair(row)
            return {**pair, "problem": None, "unused": unused}
        except RowError as error:
            problem = f"{place_of(example, index, self.name, self.is_json)}: {error}."
            return {**{column: [] for column in PREFERENCE_FEATURES}, "problem": problem, "unused": []}

    def _pair(self, row: Mapping[str, Any]) -> tuple[dict[str, list[int]], list[str]]:
        """Token ids, and the columns and fields that were not read."""
        better, worse = (self._side(row, field) for field in self.settings.answer_fields)
        lengths = [next(i for i, label in enumerate(one.labels) if label != IGNORED_LABEL) for one in (better, worse)]
        num_shared = min(lengths)  # a token that reaches over the end of the question belongs to its answer
        if better.input_ids[:num_shared] != worse.input_ids[:num_shared]:
            raise RowError(f"{self._names()} answer different questions: all but their last messages must be the same")
        if better.input_ids == worse.input_ids:
            raise RowError(
                f"{self._names()} are the same answer, from which nothing can be learned: leave the pair out"
            )
        pair = {
            "prompt_ids": better.input_ids[:num_shared],
            "chosen_ids": better.input_ids[num_shared:],
            "rejected_ids": worse.input_ids[num_shared:],
        }
        known = {self.settings.prompt_field, *self.settings.answer_fields, *_SHARED}
        unread = {name for name, value in row.items() if name not in known and value is not None}
        return pair, sorted(unread | {*better.unused, *worse.unused})

    def _names(self) -> str:
        return " and ".join(f"`{field}`" for field in self.settings.answer_fields)

    def _side(self, row: Mapping[str, Any], field: str) -> InstructionRow:
        settings = self.settings
        answer = row.get(field)
        first = answer[0] if isinstance(answer, list) and answer else None
        is_whole = isinstance(first, Mapping) and first.get("role") != ANSWER
        if answer is None or not (is_whole or row.get(settings.prompt_field) is not None):
            raise RowError(
                f"the row needs `{settings.prompt_field}`, `{settings.chosen_field}` and `{settings.rejected_field}`, or whole "
                f"conversations in {self._names()}; it has {', '.join(row) or 'none'} (name columns with --prompt_field, "
                "--chosen_field and --rejected_field)"
            )
        shared = {name: row[name] for name in _SHARED if name in row}
        parts = {"messages": answer} if is_whole else {"prompt": row[settings.prompt_field], "completion": answer}
        prepared = self.preparer.prepare({**shared, **parts}, not self.is_json)
        if prepared.problem is not None:
            raise RowError(f"`{field}`: {prepared.problem}")
        return prepared


def prepare_preferences(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: PreferenceSettings,
    name: str,
    num_processes: int | None = None,
) -> tuple[Dataset, TokenReport]:
    """Make token ids of pairs (`PREFERENCE_FEATURES`: the question once, and both answers behind it).

    Args:
        dataset: rows as [`parscale_adapt.data.sources.load_rows`] gives them.
        tokenizer: has a chat template and an end token.
        settings: how.
        name: of the data, for errors and for the report.
        num_processes: to prepare with; None is this one.

    Returns:
        The pairs that are short enough, and what was read, trained and left out; an answer's tokens are trained.

    Raises:
        ValueError: a row is no pair that can be learned from; or none is short enough.
    """
    is_json = is_json_rows(dataset)
    preparer = RowPreparer(tokenizer, InstructionSettings(None, end_token_ids=settings.end_token_ids))
    prepared = dataset.map(
        _Preparation(preparer, settings, name, is_json, _PREPARATION_VERSION),
        with_indices=True,
        remove_columns=dataset.column_names,
        features=_PREPARED_FEATURES,
        num_proc=num_processes,
        desc=f"Preparing {name}",
    )
    refuse_problems(prepared)
    tell_unused(prepared, name)
    pairs = prepared.select_columns(list(PREFERENCE_FEATURES))
    prompt, chosen, rejected = (_lengths(pairs, column) for column in PREFERENCE_FEATURES)
    longest = prompt + np.maximum(chosen, rejected)
    is_kept = longest <= (longest.max() if settings.max_length is None else settings.max_length)
    _tell_left_out(is_kept, settings.max_length, name)
    read, trained = 2 * prompt + chosen + rejected, chosen + rejected
    report = TokenReport([name], is_one_pass=True)
    report.add(
        0,
        documents=len(pairs),
        documents_dropped=int((~is_kept).sum()),
        tokens_read=int(read.sum()),
        tokens_trained=int(trained[is_kept].sum()),
        tokens_dropped=int(read[~is_kept].sum()),
        epochs=1,
    )
    return pairs if is_kept.all() else pairs.select(np.flatnonzero(is_kept)), report


def with_questions(pairs: Dataset) -> Dataset:
    """Pairs in which each answer's tokens begin with those of the question, and without a column for it."""

    def join(batch: Mapping[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        return {
            name: [prompt + answer for prompt, answer in zip(batch["prompt_ids"], batch[name], strict=True)]
            for name in ("chosen_ids", "rejected_ids")
        }

    return pairs.map(join, batched=True, remove_columns=["prompt_ids"])


def _lengths(pairs: Dataset, column: str) -> np.ndarray:
    values = pairs.select_columns([column]).with_format("arrow")[:][column]
    return np.asarray(pyarrow.compute.list_value_length(values))


def _tell_left_out(is_kept: np.ndarray, max_length: int | None, name: str) -> None:
    if not is_kept.any():
        raise ValueError(
            f"{name}: none of {len(is_kept):,} pairs has at most `max_length` {max_length} tokens: give a larger one, or "
            "shorter pairs."
        )
    if not is_kept.all():
        say(f"{name}: {(~is_kept).sum():,} of {len(is_kept):,} pairs left out: longer than {max_length:,} tokens.")
