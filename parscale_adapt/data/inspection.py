"""A look at the rows before training: what is trained, and whether documents end as they should."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice, pairwise
from typing import Any

from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from .. import terminal
from .packing import IGNORED_LABEL, check_seq_lengths
from .tokenization import end_token_of


MAX_FRACTION_WITHOUT_TARGET = 0.01
NUM_CHECKED_ROWS = 1000
_MAX_SHOWN_TOKENS = 300


def check_rows(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    num_rows: int = 3,
    *,
    max_length: int | None = None,
    end_token_ids: Collection[int] = (),
    console: Console | None = None,
) -> None:
    """Print the first rows with their loss mask, and refuse data that would teach a wrong end or nothing.

    Packed rows (`input_ids`, `seq_lengths`): each document has one end token, as its last token; what is cut at the
    row's end goes on elsewhere. Rows of questions and answers (`input_ids`, `labels`): the last trained stretch of each
    row has an end token, so that the model learns to stop, unless the row was cut.

    Args:
        dataset: rows to inspect; they are read in their order, and count from 1.
        tokenizer: the tokenizer that made the rows.
        num_rows: rows to print.
        max_length: rows of questions and answers with so many tokens were cut, so their end may be missing.
        end_token_ids: tokens that end an answer, besides the tokenizer's end token.
        console: where to print; standard output by default.

    Raises:
        ValueError: an end token is missing, doubled or inside a document; BOS is doubled; more than 1% of the checked
            rows have no target; or the columns are not those of prepared rows.
    """
    end_token_id = end_token_of(tokenizer)[1]
    checker = _RowChecker(tokenizer, end_token_id, frozenset({end_token_id, *end_token_ids}), max_length)
    console = console or terminal.console()
    num_seen = num_without_target = 0
    for number, row in enumerate(islice(dataset, max(NUM_CHECKED_ROWS, num_rows)), start=1):
        segments = list(_segments(row))
        if number <= num_rows:
            console.print(_show(row, segments, tokenizer, f"row {number}"))
        for segment in segments:
            checker.check(segment, number)
        num_seen += 1
        num_without_target += not any(segment.has_target for segment in segments)
    if num_seen == 0:
        raise ValueError("The dataset has no row: give data with at least one.")
    if num_without_target > MAX_FRACTION_WITHOUT_TARGET * num_seen:
        raise ValueError(
            f"{num_without_target} of the first {num_seen} rows have no token to train on: check the loss mask, and "
            "whether `max_length` cuts off the answers."
        )
    console.print(f"{num_seen} rows checked: end tokens and targets are in order.")


@dataclass(frozen=True)
class _Segment:
    """One document or a part of it; `is_trained[i]` says whether token i is a target."""

    input_ids: list[int]
    is_trained: list[bool]
    has_labels: bool
    may_continue: bool

    @property
    def has_target(self) -> bool:
        return any(self.is_trained)


def _segments(row: Mapping[str, Any]) -> Iterator[_Segment]:
    if "input_ids" not in row or not ("labels" in row or "seq_lengths" in row):
        raise ValueError(
            "Rows must have the columns `input_ids` and `seq_lengths` (packed) or `labels` (questions and answers), got "
            f"{', '.join(row)}."
        )
    input_ids = [int(token) for token in row["input_ids"]]
    labels = [int(label) for label in row.get("labels", input_ids)]
    if len(labels) != len(input_ids):
        raise ValueError(f"A row must have as many labels as tokens, got {len(labels)} and {len(input_ids)}.")
    seq_lengths = check_seq_lengths(row) if "seq_lengths" in row else [len(input_ids)]
    start = 0
    for number, length in enumerate(seq_lengths, start=1):
        part = slice(start, start + length)
        # The first token of a segment has no predecessor within it, so nothing predicts it.
        is_trained = [index > 0 and label != IGNORED_LABEL for index, label in enumerate(labels[part])]
        yield _Segment(input_ids[part], is_trained, "labels" in row, number == len(seq_lengths))
        start += length


@dataclass(frozen=True)
class _RowChecker:
    """The rules for one segment; `number` names the row in messages."""

    tokenizer: PreTrainedTokenizerBase
    end_token_id: int
    answer_ends: frozenset[int]
    max_length: int | None

    def check(self, segment: _Segment, number: int) -> None:
        """Raise ValueError if the segment breaks a rule."""
        begin = self.tokenizer.bos_token_id
        if begin is not None and begin != self.end_token_id and segment.input_ids[:2] == [begin, begin]:
            raise ValueError(
                f"Row {number} begins with two BOS tokens ({self.tokenizer.bos_token!r}): the text or the chat template "
                "already has the one that the tokenizer adds."
            )
        if segment.has_labels:
            self._check_trained_end(segment, number)
        else:
            self._check_document_end(segment, number)

    def _check_document_end(self, segment: _Segment, number: int) -> None:
        tokens = segment.input_ids
        if len(tokens) > 1 and tokens[0] == self.tokenizer.bos_token_id == self.end_token_id:
            tokens = tokens[1:]
        if self.end_token_id in tokens[:-1]:
            raise ValueError(
                f"Row {number}: a document has the end token {self.tokenizer.eos_token!r} before its end: the text holds "
                "it already, or boundaries are missing in `seq_lengths`."
            )
        if tokens[-1] != self.end_token_id and not segment.may_continue:
            raise ValueError(f"Row {number}: a document lacks its end token {self.tokenizer.eos_token!r}.")

    def _check_trained_end(self, segment: _Segment, number: int) -> None:
        if not segment.has_target:
            return
        last = max(place for place, trained in enumerate(segment.is_trained) if trained)
        first = last
        while segment.is_trained[first - 1]:
            first -= 1
        answer = segment.input_ids[first : last + 1]
        is_cut = self.max_length is not None and len(segment.input_ids) >= self.max_length
        if not is_cut and not self.answer_ends.intersection(answer):
            raise ValueError(
                f"Row {number}: no end token such as {self.tokenizer.eos_token!r} is trained, so the model would not learn "
                "to stop: it is masked, or missing in the chat template."
            )
        if any(pair == (self.end_token_id, self.end_token_id) for pair in pairwise(answer)):
            raise ValueError(
                f"Row {number}: the end token {self.tokenizer.eos_token!r} is doubled: the data or the chat template "
                "already has the one that is added."
            )


def show_prepared(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, title: str) -> Panel:
    """A prepared row as text, with what is not trained in ⟦brackets⟧."""
    return _show(row, list(_segments(row)), tokenizer, title)


def _show(row: Mapping[str, Any], segments: list[_Segment], tokenizer: PreTrainedTokenizerBase, title: str) -> Panel:
    text = Text()
    num_shown = 0
    for segment in segments:
        for is_trained, group in groupby(zip(segment.is_trained, segment.input_ids), key=lambda pair: pair[0]):
            tokens = [token for _, token in group][: _MAX_SHOWN_TOKENS - num_shown]
            if tokens:
                decoded = str(tokenizer.decode(tokens))
                text.append(decoded if is_trained else f"⟦{decoded}⟧", style="" if is_trained else "dim")
            num_shown += len(tokens)
    num_hidden = len(row["input_ids"]) - num_shown
    if num_hidden:
        text.append(f" … {num_hidden} more tokens", style="italic")
    num_trained = sum(sum(segment.is_trained) for segment in segments)
    title = f"{title}: {len(row['input_ids'])} tokens, {num_trained} trained; ⟦not trained⟧"
    return Panel(text, title=title, title_align="left")
