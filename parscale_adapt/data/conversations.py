"""Rows of question and answer data as conversations, in whichever columns they have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .chat_template import Conversation
from .messages import ANSWER, describe, from_json, read_messages, without_nulls
from .row_files import RowError


_CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
_SYSTEM_COLUMNS = ("system", "system_prompt")
_TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
_ALPACA = ("instruction", "output", "input")
_STANDARD_FIELDS = ("prompt", "completion")
# Columns that hold a part of what the model is to see or to say, in forms that are not read.
_REFUSED_COLUMNS = {
    **dict.fromkeys(
        ("image", "images", "audio", "audios", "video", "videos", "pixel_values", "input_features"),
        "only text can be trained on, so drop the column or take other data",
    ),
    "functions": "write them as a column `tools`, each as an object with `type` and `function`",
    "history": "write the turns before as `messages`",
}
# What others call whether a message is trained.
_REFUSED_KEYS = ("train", "training", "train_detail")


@dataclass(frozen=True)
class ReadRow:
    """A row's conversation, the name of its format, and the columns that have content and were not read."""

    conversation: Conversation
    format: str
    unused: list[str]


def read_row(row: Mapping[str, Any], fields: tuple[str, str], is_arrow: bool) -> ReadRow:
    """Read a row in any of the formats.

    Args:
        row: its columns.
        fields: columns of question and answer, where a row is no conversation.
        is_arrow: the row comes from an Arrow table, which fills in what is missing with nulls.

    Raises:
        RowError: it can't be read; the row is not named.
    """
    for name, remedy in _REFUSED_COLUMNS.items():
        if not _is_empty(row.get(name)):
            raise RowError(f"the column `{name}` is not read: {remedy}")
    messages, num_given, format_, read = _read_messages(row, fields, is_arrow)
    for message in messages:
        _check_message(message)
    system = [name for name in _SYSTEM_COLUMNS if name not in read and not _is_empty(row.get(name))]
    if system:
        messages = [_read_system(row, system, messages), *messages]
    conversation = Conversation(
        messages,
        num_given + len(system),
        _read_tools(row.get("tools"), is_arrow),
        _read_template_options(row.get("chat_template_kwargs"), is_arrow),
    )
    read = {*read, *system, *_TEMPLATE_COLUMNS}
    return ReadRow(conversation, format_, [name for name in row if name not in read and not _is_empty(row[name])])


def is_instruction_row(row: Mapping[str, Any], fields: tuple[str, str]) -> bool:
    """Whether a row has columns of questions and answers, whatever is in them."""
    has_pair = all(name in row for name in fields) or all(name in row for name in _ALPACA[:2])
    return has_pair or any(name in row for name in _CONVERSATION_COLUMNS)


def _read_messages(
    row: Mapping[str, Any], fields: tuple[str, str], is_arrow: bool
) -> tuple[list[dict[str, Any]], int, str, set[str]]:
    """Messages, how many of them come before what is learned, the format, and the columns."""
    has_pair = all(name in row for name in fields)
    columns = [name for name in _CONVERSATION_COLUMNS if name in row]
    column = next((name for name in columns if row[name] is not None), None)
    if columns and not has_pair:
        column = column or columns[0]
    if column is not None and (fields == _STANDARD_FIELDS or not has_pair):
        messages = read_messages(row[column], column, is_arrow)
        return messages, len(messages) - 1, f"conversations in `{column}`", {column}
    if has_pair:
        messages, num_given = _read_pair(row, fields, is_arrow)
        return messages, num_given, f"`{fields[0]}` and `{fields[1]}`", set(fields)
    if all(name in row for name in _ALPACA[:2]):
        return _read_alpaca(row), 1, "`instruction`, `input` and `output`", {*_ALPACA}
    raise RowError(
        f"the row needs a column `messages` or `conversations`, or `{fields[0]}` and `{fields[1]}`, or `instruction` and "
        f"`output`; it has {', '.join(row) or 'none'} (name columns with --prompt_field and --completion_field, and train "
        "on plain text with cpt.py)"
    )


def _read_system(row: Mapping[str, Any], names: list[str], messages: list[dict[str, Any]]) -> dict[str, Any]:
    content = row[names[0]]
    if not isinstance(content, str):
        raise RowError(f"`{names[0]}` must hold text, got {describe(content)}")
    if len(names) > 1 or messages[0]["role"] == "system":
        raise RowError(f"the row has two system messages, one of them in the column `{names[0]}`")
    return {"role": "system", "content": content}


def _read_pair(row: Mapping[str, Any], fields: tuple[str, str], is_arrow: bool) -> tuple[list[dict[str, Any]], int]:
    given, wanted = (_decoded_list(row[name]) for name in fields)
    if isinstance(given, list) and isinstance(wanted, list):
        prompt, completion = (read_messages(value, name, is_arrow) for value, name in zip((given, wanted), fields))
        if completion[0]["role"] != ANSWER:
            raise RowError(f"`{fields[1]}` must begin with an answer of the assistant, got {describe(completion[0])}")
        return prompt + completion, len(prompt)
    if not isinstance(given, str) or not isinstance(wanted, str):
        raise RowError(
            f"`{fields[0]}` and `{fields[1]}` must both hold text, or both lists of messages, got {describe(given)} and "
            f"{describe(wanted)}"
        )
    return _pair(given, wanted, fields[1]), 1


def _decoded_list(value: Any) -> Any:
    """The list of messages that a text is JSON of; a text that is none stays text."""
    if isinstance(value, str) and value.lstrip().startswith(("[{", "[ {")):
        try:
            decoded = json.loads(value)
        except ValueError:
            return value
        if isinstance(decoded, list) and all(
            isinstance(one, dict) and {"role", "from"} & one.keys() for one in decoded
        ):
            return decoded
    return value


def _read_alpaca(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    instruction, output, more = (row.get(name) for name in _ALPACA)
    if not isinstance(instruction, str) or not isinstance(output, str) or not isinstance(more, str | None):
        raise RowError(
            f"`instruction`, `input` and `output` must hold text, got {describe(instruction)}, {describe(more)} and "
            f"{describe(output)}"
        )
    return _pair(f"{instruction}\n\n{more}" if more else instruction, output, "output")


def _pair(question: str, answer: str, name: str) -> list[dict[str, Any]]:
    if not answer:
        raise RowError(f"`{name}` is empty, which would teach to say nothing")
    return [{"role": "user", "content": question}, {"role": ANSWER, "content": answer}]


def _check_message(message: Mapping[str, Any]) -> None:
    if message.get("weight", 1) not in (0, 1):
        raise RowError(f"`weight` of a message must be 0 (not trained) or 1, got {describe(message['weight'])}")
    for key in _REFUSED_KEYS:
        if key in message:
            raise RowError(f"`{key}` of a message is not read: leave messages out of training with `weight` 0")


def _read_tools(value: Any, is_arrow: bool) -> list[Any] | None:
    tools = from_json(value, "tools")
    if _is_empty(tools):
        return None
    tools = [from_json(tool, "tools") for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"`tools` must be a list of JSON schemas of functions, got {describe(value)}")
    return without_nulls(tools) if is_arrow else tools


def _read_template_options(value: Any, is_arrow: bool) -> dict[str, Any]:
    options = from_json(value, "chat_template_kwargs")
    if _is_empty(options):
        return {}
    if not isinstance(options, dict):
        raise RowError(f"`chat_template_kwargs` must be an object, got {describe(value)}")
    return without_nulls(options) if is_arrow else options


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)
