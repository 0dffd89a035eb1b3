"""Questions that a model answers as it trains, beside whatever columns tell what a right answer is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow
from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .instructions import columns_of, place_of
from .messages import ANSWER, describe, read_messages
from .report import TokenReport
from .row_files import RowError
from .saying import say
from .sources import is_json_rows


PROMPT_FORMATS = ("chat", "text")
PROMPT = "prompt"  # the column that trainers read
# Columns that TRL would take for images, or that have the name of a keyword with which it calls reward functions.
_TAKEN_NAMES = (
    "image",
    "images",
    "prompts",
    "completions",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
)
_NOT_HANDED_ON = ("completion", "completion_ids")  # TRL's own names, which no reward function gets


@dataclass(frozen=True)
class PromptSettings:
    """How questions are read.

    Args:
        max_length: tokens of a question, as the model sees it; longer ones are left out.
        prompt_field: their column: text, or a list of messages.
        prompt_format: "chat" makes a user's message of a text, "text" shows it to the model as it is.
    """

    max_length: int
    prompt_field: str = PROMPT
    prompt_format: str = "chat"

    def __post_init__(self) -> None:
        if self.prompt_format not in PROMPT_FORMATS:
            raise ValueError(
                f"`prompt_format` must be one of {', '.join(PROMPT_FORMATS)}, got {self.prompt_format!r}."
            )
        if self.max_length < 1:
            raise ValueError(f"`max_prompt_length` must be at least 1 token, got {self.max_length!r}.")


def prepare_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: PromptSettings, name: str
) -> tuple[Dataset, TokenReport]:
    """Read questions into the column `prompt`, a text or a list of messages, and keep all other columns.

    Args:
        dataset: rows as [`parscale_adapt.data.sources.load_rows`] gives them.
        tokenizer: has a chat template where there are messages.
        settings: how.
        name: of the data, for errors and for the report.

    Returns:
        The rows whose question is short enough, and what was read and left out.

    Raises:
        ValueError: a row has no question, the template refuses it, a column has values of several types, or no question
            is short enough.
    """
    kept, counts = [], {"documents": 0, "documents_dropped": 0, "tokens_read": 0, "tokens_dropped": 0}
    for row, num_tokens in _read(dataset, tokenizer, settings, name):
        is_kept = num_tokens <= settings.max_length
        counts["documents"] += 1
        counts["tokens_read"] += num_tokens
        counts["documents_dropped"] += not is_kept
        counts["tokens_dropped"] += 0 if is_kept else num_tokens
        if is_kept:
            kept.append(row)
    _tell_left_out(counts, settings.max_length, name)
    for column in _NOT_HANDED_ON:
        if any(column in row for row in kept):
            say(f"{name}: no reward function gets the column `{column}`, a name of TRL's: rename it if one needs it.")
    report = TokenReport([name], is_one_pass=True)
    report.add(0, **counts, epochs=1)
    return _as_dataset(kept, name), report


def _read(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: PromptSettings, name: str
) -> Iterator[tuple[dict[str, Any], int]]:
    is_json = is_json_rows(dataset)
    for index, example in enumerate(dataset):
        try:
            columns = columns_of(example, is_json)
            prompt = _prompt(columns, settings, not is_json)
            num_tokens = _num_tokens(prompt, tokenizer)
        except RowError as error:
            raise ValueError(f"{place_of(example, index, name, is_json)}: {error}.") from error
        others = {key: value for key, value in columns.items() if key != settings.prompt_field}
        yield {PROMPT: prompt, **others}, num_tokens


def _prompt(row: Mapping[str, Any], settings: PromptSettings, is_arrow: bool) -> str | list[dict[str, Any]]:
    field = settings.prompt_field
    if row.get(field) is None:
        raise RowError(
            f"the row needs a question in `{field}`; it has {', '.join(row) or 'none'} (name its column with "
            "--prompt_field)"
        )
    if field != PROMPT and PROMPT in row:
        raise RowError(
            f"the row has the columns `{field}` and `{PROMPT}`, either of which may be the question: drop one"
        )
    taken = [column for column in _TAKEN_NAMES if column in row and column != field]
    if taken:
        raise RowError(f"the column `{taken[0]}` has a name that TRL uses for something else: rename it, or drop it")
    value = row[field]
    if isinstance(value, str):
        if not value:
            raise RowError(f"`{field}` is empty")
        return value if settings.prompt_format == "text" else [{"role": "user", "content": value}]
    if settings.prompt_format == "text":
        raise RowError(f"`{field}` must hold text with `prompt_format='text'`, got {describe(value)}")
    messages = read_messages(value, field, is_arrow)
    if messages[-1]["role"] == ANSWER:
        raise RowError(f"`{field}` ends with an answer of the assistant, which the model is to give: leave it out")
    return messages


def _num_tokens(prompt: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> int:
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    try:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise RowError(f"the chat template refuses the row: {' '.join(str(error).split()).rstrip('.')}") from error
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _tell_left_out(counts: Mapping[str, int], max_length: int, name: str) -> None:
    dropped, total = counts["documents_dropped"], counts["documents"]
    if dropped == total:
        raise ValueError(
            f"{name}: none of {total:,} questions has at most `max_prompt_length` {max_length:,} tokens: give a larger one, or "
            "shorter questions."
        )
    if dropped:
        say(f"{name}: {dropped:,} of {total:,} questions left out: longer than {max_length:,} tokens.")


def _as_dataset(rows: list[dict[str, Any]], name: str) -> Dataset:
    names = list(dict.fromkeys(key for row in rows for key in row))
    columns = {}
    for key in names:
        try:
            columns[key] = pyarrow.array([row.get(key) for row in rows])
        except pyarrow.ArrowException as error:
            raise ValueError(f"{name}: the column `{key}` has values of several types: {error}.") from error
        except OverflowError as error:
            raise ValueError(
                f"{name}: the column `{key}` has a whole number of more than 64 bits: write it as text."
            ) from error
    return Dataset(pyarrow.table(columns))
