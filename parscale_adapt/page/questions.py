"""What a browser sends, checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..serving.generation import Messages


_ROLES = ("system", "user", "assistant")
_LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Question:
    """A conversation that waits for an answer.

    Attributes:
        messages: a system prompt or none, then questions and answers in turn; the last one is a question.
        temperature: 0 takes the most likely token each time.
        seed: of the draws.
        max_new_tokens: of the answer at most.
    """

    messages: Messages
    temperature: float
    seed: int
    max_new_tokens: int


def read_question(body: Mapping[str, Any]) -> Question:
    """The question in a request.

    Raises:
        ValueError: something is missing, or no value that it can have.
    """
    temperature = body.get("temperature", 0)
    if not _is_number(temperature) or not 0 <= temperature <= 10:
        raise ValueError(f"`temperature` must be a number from 0 to 10, got {temperature!r}.")
    return Question(
        read_messages(body.get("messages")),
        float(temperature),
        read_whole_number(body, "seed", 0, _LARGEST_SEED),
        read_whole_number(body, "max_new_tokens", 1, 2**20),
    )


def read_messages(messages: object) -> Messages:
    """The messages of a request.

    Raises:
        ValueError: they are no conversation whose last message is a question.
    """
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise ValueError(f"`messages` must be a list of objects with a `role` ({', '.join(_ROLES)}) and a `content`.")
    found = [{"role": message["role"], "content": message["content"]} for message in messages]
    turns = [message["role"] for message in found[found[:1] != [] and found[0]["role"] == "system" :]]
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ValueError("`messages` must be questions and answers in turn, the last one a question.")
    if not found[-1]["content"].strip():
        raise ValueError("The question is empty: write one.")
    return found


def read_tokens(tokens: object, vocabulary: int) -> list[int]:
    """Token ids of an answer.

    Raises:
        ValueError: they are none, or outside of the vocabulary.
    """
    if not isinstance(tokens, list) or not tokens or not all(_is_whole(it) and 0 <= it < vocabulary for it in tokens):
        raise ValueError(f"`tokens` must be a list of token ids below {vocabulary}, at least one.")
    return tokens


def read_whole_number(body: Mapping[str, Any], name: str, smallest: int, largest: int) -> int:
    """A whole number in a request.

    Raises:
        ValueError: it is missing, none, or out of range.
    """
    value = body.get(name)
    if not _is_whole(value) or not smallest <= value <= largest:  # type: ignore[operator]
        raise ValueError(f"`{name}` must be a whole number from {smallest} to {largest}, got {value!r}.")
    return value  # type: ignore[return-value]


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") in _ROLES and isinstance(message.get("content"), str)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
