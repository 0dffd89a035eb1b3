"""Rows of questions and answers as token ids with labels, and what is cut, dropped or refused of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from .chat_template import ChatRenderer, Conversation
from .conversations import read_row
from .messages import ANSWER, describe, words_of
from .packing import IGNORED_LABEL
from .row_files import RowError


LAST_ANSWER, ALL_ANSWERS, ALL_TEXT = "last_answer", "all_answers", "all_text"
TRAIN_ON = (LAST_ANSWER, ALL_ANSWERS, ALL_TEXT)


@dataclass(frozen=True)
class InstructionSettings:
    """How rows become token ids.

    Args:
        max_length: tokens per row; None cuts nothing.
        train_on: the answer at the end of each row (`last_answer`), every answer (`all_answers`), or the questions too
            (`all_text`).
        prompt_field, completion_field: columns of rows that are no conversations.
        keeps_end: cut rows at their start.
        end_token_ids: tokens at which generation stops.
    """

    max_length: int | None
    train_on: str = LAST_ANSWER
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    keeps_end: bool = False
    end_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.train_on not in TRAIN_ON:
            raise ValueError(f"`train_on` must be one of {', '.join(TRAIN_ON)}, got {self.train_on!r}.")


@dataclass(frozen=True)
class InstructionRow:
    """One row as it is trained.

    Args:
        input_ids: token ids, cut to `max_length`.
        labels: the same, or -100 where nothing is trained.
        num_tokens: tokens before the cut.
        format: of the row, in words.
        problem: why the row can't be used, None if it can.
        unused: columns and fields that were not read.
        lost_prompt: what generation is prompted with and training lacks.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    num_tokens: int = 0
    format: str = ""
    problem: str | None = None
    unused: Sequence[str] = ()
    lost_prompt: str = ""

    @property
    def num_trained(self) -> int:
        """Targets: the first token has no predecessor, so nothing predicts it."""
        return sum(label != IGNORED_LABEL for label in self.labels[1:])


class RowPreparer:
    """Makes an [`InstructionRow`] of a row of a dataset, whatever its format.

    Args:
        tokenizer: has a chat template and an end token.
        settings: how.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: InstructionSettings):
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} can't tell where its tokens lie in a text, which needs a fast tokenizer: give "
                "the backbone a tokenizer.json."
            )
        self.settings = settings
        self.renderer = ChatRenderer(tokenizer)

    def prepare(self, row: Mapping[str, Any], is_arrow: bool) -> InstructionRow:
        """Prepare a row; what is wrong with it is told in `problem`.

        Args:
            row: its columns.
            is_arrow: the row comes from an Arrow table, which fills in what is missing with nulls.
        """
        try:
            read = read_row(row, (self.settings.prompt_field, self.settings.completion_field), is_arrow)
            self._check_roles(read.conversation)
            unread, lost_prompt = self.renderer.check(read.conversation)
            text, spans = self._spans(read.conversation)
            prepared = self._tokenized(text, spans)
        except RowError as error:
            return InstructionRow(problem=str(error))
        unused = [*read.unused, *(f"{name} in messages" for name in sorted(unread))]
        return replace(prepared, format=read.format, unused=unused, lost_prompt=lost_prompt)

    def _check_roles(self, conversation: Conversation) -> None:
        last = conversation.messages[-1]
        if self.settings.train_on == LAST_ANSWER and last["role"] != ANSWER:
            raise RowError(f"the row must end with an answer of the assistant, its last message is {describe(last)}")
        if self.settings.train_on != ALL_TEXT and not self._answers(conversation):
            raise RowError("the row has no answer of the assistant to train on")

    def _answers(self, conversation: Conversation) -> list[int]:
        first = 0 if self.settings.train_on == ALL_ANSWERS else conversation.num_given
        return [place for place in conversation.answers if place >= first]

    def _spans(self, conversation: Conversation) -> tuple[str, list[_Span]]:
        """The text, and the parts of it that are trained."""
        if self.settings.train_on == ALL_TEXT:
            if any(message.get("weight") == 0 for message in conversation.messages):
                raise RowError("`weight` 0 of a message has no effect where all text is trained: leave it out")
            text, last = self.renderer.render(conversation), conversation.messages[-1]
            said = words_of(last)[-1:] if last["role"] == ANSWER else []
            return text, [_Span(0, len(text), max(text.rfind(said[0]), 0) if said else None)]
        takes_marks = self.settings.train_on == ALL_ANSWERS
        text, spans = self.renderer.answer_spans(conversation, self._answers(conversation), takes_marks)
        return text, [_Span(start, end, start) for start, end in spans]

    def _tokenized(self, text: str, spans: list[_Span]) -> InstructionRow:
        encoding = self.renderer.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        input_ids = encoding["input_ids"]
        ends = [end for _, end in encoding["offset_mapping"]]  # starts leave out leading spaces in some tokenizers
        labels = [IGNORED_LABEL] * len(input_ids)
        for span in spans:
            # A token that reaches over the start belongs to the answer, as the prompt alone would not give it; one
            # that reaches over the end belongs to what follows.
            inside = slice(bisect_right(ends, span.start), bisect_right(ends, span.end))
            labels[inside] = input_ids[inside]
            if span.answer is not None:
                answer = slice(bisect_right(ends, span.answer), inside.stop)
                self._check_end_token(input_ids[answer], text[span.answer : span.end])
        length = self.settings.max_length
        part = slice(None) if length is None else slice(-length, None) if self.settings.keeps_end else slice(length)
        return InstructionRow(input_ids[part], labels[part], len(input_ids))

    def _check_end_token(self, answer: list[int], text: str) -> None:
        ends = self.settings.end_token_ids
        names = ", ".join(repr(self.renderer.tokenizer.convert_ids_to_tokens(token)) for token in sorted(ends))
        if not ends & set(answer):
            raise RowError(
                f"the answer ends with {text[-20:]!r} and never with the end token ({names}), so that the model would not "
                "learn to stop: write {{ eos_token }} there in the chat template, or name the token that ends answers "
                "with --eos_token"
            )
        if any(one == two and one in ends for one, two in pairwise(answer)):
            raise RowError(f"the end token ({names}) is doubled: the data or the chat template has it already")


@dataclass(frozen=True)
class _Span:
    """A part of a text that is trained, and where the answer begins that has to end in it, if one does."""

    start: int
    end: int
    answer: int | None
