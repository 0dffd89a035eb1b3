"""Messages in the shapes that they have in the wild, turned into the one that chat templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .row_files import RowError


# What roles are called elsewhere: ShareGPT, OpenAssistant, Gemini, Llama.
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
    **dict.fromkeys(("developer",), "developer"),
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
ANSWER = "assistant"
# What an answer may consist of besides its content.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


def read_messages(value: Any, name: str, drops_nulls: bool = False) -> list[dict[str, Any]]:
    """Turn a column into messages with `role`, `content` (text) and whatever else they carry.

    Args:
        value: a list of messages, or JSON of one; messages may be JSON too.
        name: of the column, for errors.
        drops_nulls: leave out what is null within messages, since Arrow gives all of them the same fields.

    Raises:
        RowError: it is no list of messages with a known role and text, without the row's place.
    """
    messages = from_json(value, name)
    if not isinstance(messages, list):
        raise RowError(f"`{name}` must be a list of messages, got {describe(value)}")
    if not messages:
        raise RowError(f"`{name}` is empty, it must hold at least one message")
    return [
        _read_message(from_json(message, f"{name}[{number}]"), f"message {number} of `{name}`", drops_nulls)
        for number, message in enumerate(messages, start=1)
    ]


def from_json(value: Any, name: str) -> Any:
    """Decode a value that is JSON in a string; others are as they are.

    Raises:
        RowError: it is a string and no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        hint = ""
        if value.lstrip().startswith(("[{'", "{'")):
            hint = "; it looks like what Python prints, write it with `json.dumps`"
        raise RowError(f"`{name}` is a text that is no JSON: {describe(value)}{hint}") from error


def without_nulls(value: Any) -> Any:
    """Leave out what is null in mappings, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def describe(value: Any) -> str:
    """A value, short enough for a sentence."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def words_of(message: Mapping[str, Any]) -> list[str]:
    """What has to stand in the text of a message, in this order: its content, and the names of functions it calls."""
    words = [message["content"].strip(), *(call["function"]["name"] for call in message.get("tool_calls", ()))]
    return [word for word in words if word]


def _read_message(message: Any, place: str, drops_nulls: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RowError(f"{place} must be an object with `role` and `content`, got {describe(message)}")
    message = {key: value for key, value in message.items() if value is not None}
    role_key = next((key for key in _ROLE_KEYS if key in message), None)
    if role_key is None:
        raise RowError(f"{place} has no `role` (or `from`), its fields are {', '.join(message) or 'none'}")
    given = message.pop(role_key)
    role = _ROLES.get(str(given).strip().lower())
    if role is None:
        raise RowError(f"{place} has the unknown role {describe(given)}, known are {', '.join(sorted(_ROLES))}")
    content_key = next((key for key in _CONTENT_KEYS if key in message), None)
    content = None if content_key is None else _read_content(message.pop(content_key), f"{place} ({role})")
    if drops_nulls:
        message = without_nulls(message)
    if role == "function_call":
        role, message["tool_calls"], content = ANSWER, content, None
    if "function_call" in message:
        message["tool_calls"] = [message.pop("function_call")]
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    else:
        message["tool_calls"] = _read_tool_calls(message["tool_calls"], place)
    if role == ANSWER:
        if not content and not any(message.get(key) for key in ("tool_calls", *REASONING_KEYS)):
            raise RowError(f"{place} is an answer with neither text nor tool calls, which would teach to say nothing")
    elif content is None:
        raise RowError(f"{place} ({role}) has no `content`")
    return {"role": role, "content": content or "", **message}


def _read_content(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RowError(f"{place} must have text as its content, got {describe(content)}")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise RowError(f"{place} has a part that is no text: {describe(part)}")
        kind = part.get("type") or "text"
        text = part.get("text")
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise RowError(f"{place} has a part of the type {describe(kind)}, and only text can be trained on")
        texts.append(text)
    return "".join(texts)


def _read_tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    calls = from_json(calls, f"tool_calls of {place}")
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = from_json(call, f"tool_calls of {place}")
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(f"{place} has a tool call without the name of a function: {describe(call)}")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            arguments = _json_object(arguments)
        outside = {key: value for key, value in call.items() if key not in ("function", "type", *function)}
        named = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        read.append({**outside, "type": "function", "function": named})
    return read


def _json_object(text: str) -> Any:
    """The object that a text is JSON of, as OpenAI's API gives arguments; the text itself if it is none."""
    try:
        value = json.loads(text) if text.strip() else {}
    except ValueError:
        return text
    return value if isinstance(value, dict) else text
