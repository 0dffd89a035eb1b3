"""Conversations as text: what a chat template makes of them, where each answer stands, and what it leaves out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .messages import ANSWER, REASONING_KEYS, words_of
from .row_files import RowError


# ChatML, but with the tokenizer's own end token, at which generation stops. Tools are told and called as Qwen does.
CHATML = (
    "{% if tools %}<|im_start|>system\nYou may call these functions, each given as JSON:\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'To call one, write <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>{{ eos_token }}\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}{% if message['content'] or not loop.first %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "parscaleprobe"
_PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": f"{_PROBE}tool",
        "description": "x",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": []},
    },
}
# Content of a message that would be lost without a trace; other fields that a template does not read are told.
_CARRY_CONTENT = ("tool_calls", *REASONING_KEYS, "refusal", "images", "image", "audio", "audios", "video", "videos")
_READ_HERE = ("role", "content", "weight")


@dataclass(frozen=True)
class Conversation:
    """What a row says.

    Args:
        messages: with `role` and `content`; the template sees all other fields too.
        num_given: messages that come before what is to be learned.
        tools: JSON schemas of functions for the template's `tools`.
        template_options: more variables of the template.
    """

    messages: list[dict[str, Any]]
    num_given: int
    tools: list[Any] | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> list[int]:
        """Places of the assistant's messages that may be trained: of all with another `weight` than 0."""
        places = range(len(self.messages))
        return [place for place in places if self.messages[place]["role"] == ANSWER and self._is_weighted(place)]

    def _is_weighted(self, place: int) -> bool:
        return self.messages[place].get("weight", 1) != 0


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: has a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._findings: dict[Any, tuple[set[str], str]] = {}
        self._arguments_as_text: bool | None = None

    def render(
        self, conversation: Conversation, num_messages: int | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of the first messages, of all by default.

        Raises:
            RowError: the template refuses them.
        """
        return self._render(conversation, num_messages, add_generation_prompt, marks_answers=False)[0]

    def answer_spans(
        self, conversation: Conversation, answers: Sequence[int], takes_marks: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and where some answers begin and end in it, from what a prompt ends with to the end token.

        Args:
            conversation: to render.
            answers: places of messages.
            takes_marks: let the template's own marks (``{% generation %}``) say where answers are, if it has any. Else
                each answer is what the text grows by when its message follows.

        Raises:
            RowError: the template refuses the messages, or renders them differently when others follow.
        """
        if takes_marks and _GENERATION.search(self._template(conversation.tools)):
            return self._marked_spans(conversation, answers)
        text = self.render(conversation)
        return text, [self._grown_span(conversation, answer, text) for answer in answers]

    def check(self, conversation: Conversation) -> tuple[set[str], str]:
        """Refuse a conversation of which the template leaves something out.

        Returns:
            Fields of messages that the template does not read, and that hold no content; and what generation is
            prompted with while the whole conversation lacks it.

        Raises:
            RowError: content, a tool or an option is left out.
        """
        template = self._template(conversation.tools)
        if conversation.tools and "tools" not in template:
            raise RowError("the chat template renders no tools, and the row has the column `tools`")
        for name in conversation.template_options:
            if name not in template:
                raise RowError(f"the chat template reads no {name!r}, which `chat_template_kwargs` of the row holds")
        for key in _CARRY_CONTENT:
            names = (
                REASONING_KEYS if key in REASONING_KEYS else (key,)
            )  # transformers gives reasoning under all of them
            if any(key in message for message in conversation.messages) and not any(
                name in template for name in names
            ):
                raise RowError(f"the chat template does not render `{key}`, which a message of the row holds")
        return self._check_shape(conversation)

    def _check_shape(self, conversation: Conversation) -> tuple[set[str], str]:
        """Render a conversation of the same shape with words of our own, which have to come out; as [`check`]."""
        messages, words, arguments = _probed([*conversation.messages])
        shape = tuple((one["role"], *sorted(one), one["content"], len(one.get("tool_calls", ()))) for one in messages)
        key = (shape, conversation.num_given, bool(conversation.tools))
        if key in self._findings:
            return self._findings[key]
        tools = [_PROBE_TOOL] if conversation.tools else None
        if tools:
            words[_PROBE_TOOL["function"]["name"]] = "the column `tools`"
        probe = replace(conversation, messages=messages, tools=tools)
        text = self.render(probe)
        for word, what in words.items():
            if word not in text:
                raise RowError(f"the chat template leaves out {what}")
        unread = self._unread_fields(probe, text)
        if any(word not in text for word in arguments):
            unread.add("arguments of tool calls")
        lost_prompt = ""
        if 0 < probe.num_given < len(messages):
            prompt = self.render(probe, probe.num_given, add_generation_prompt=True)
            lost_prompt = prompt[_num_common(prompt, text) :]
        self._findings[key] = unread, lost_prompt
        return self._findings[key]

    def _unread_fields(self, conversation: Conversation, text: str) -> set[str]:
        """Fields without which the text is the same; what carries content may be left out of earlier turns."""
        fields = {field for message in conversation.messages for field in message}
        unread = set()
        for field_ in fields - {*_READ_HERE, *_CARRY_CONTENT}:
            without = [{name: one[name] for name in one if name != field_} for one in conversation.messages]
            try:
                if self.render(replace(conversation, messages=without)) == text:
                    unread.add(field_)
            except RowError:  # the template can't do without it
                continue
        return unread

    def _grown_span(self, conversation: Conversation, answer: int, text: str) -> tuple[int, int]:
        if answer == 0:
            raise RowError("the row begins with an answer: there is no question before it")
        prompt = self.render(conversation, answer, add_generation_prompt=True)
        start = _num_common(prompt, text)
        if not _stands_in(conversation.messages[answer - 1], text[:start]) and start < _num_common(
            prompt, self.render(conversation, answer)
        ):
            raise RowError(
                f"the chat template renders what comes before message {answer + 1} differently when that follows"
            )
        if answer == len(conversation.messages) - 1:
            return start, len(text)
        end = _num_common(self.render(conversation, answer + 1), text)
        if end <= start or not _stands_in(conversation.messages[answer], text[start:end]):
            raise RowError(
                f"the chat template renders the answer in message {answer + 1} differently when others follow, so it can't "
                "be told where all answers are: train on last_answer, or mark answers with {% generation %} in the template"
            )
        return start, end

    def _marked_spans(self, conversation: Conversation, answers: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
        text, spans = self._render(conversation, None, False, marks_answers=True)
        said = [place for place, message in enumerate(conversation.messages) if message["role"] == ANSWER]
        if len(spans) < len(said) or (len(spans) > len(said) > len(answers)):
            raise RowError(
                f"the chat template marks {len(spans)} parts of {len(said)} answers with {{% generation %}}"
            )
        return text, spans if len(said) == len(answers) else [spans[said.index(answer)] for answer in answers]

    def _render(
        self, conversation: Conversation, num_messages: int | None, add_generation_prompt: bool, marks_answers: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        messages = conversation.messages[:num_messages]
        if any("tool_calls" in message for message in messages) and self._takes_arguments_as_text(conversation):
            messages = [_with_text_arguments(message) for message in messages]
        return self._apply(conversation, messages, add_generation_prompt, marks_answers)

    def _apply(
        self,
        conversation: Conversation,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        marks_answers: bool,
    ) -> tuple[str, list[tuple[int, int]]]:
        tools = conversation.tools or None
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self._template(tools),
                return_assistant_tokens_mask=marks_answers,
                add_generation_prompt=add_generation_prompt,
                **{**self.tokenizer.special_tokens_map, **conversation.template_options},
            )
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise RowError(f"the chat template refuses the row: {reason}") from error
        return texts[0], [tuple(span) for span in spans[0]] if marks_answers else []

    def _template(self, tools: list[Any] | None) -> str:
        return self.tokenizer.get_chat_template(tools=tools or None)

    def _takes_arguments_as_text(self, conversation: Conversation) -> bool:
        """Whether the template puts `arguments` into the text as they are; most write a mapping as JSON."""
        if self._arguments_as_text is None:
            call = {"type": "function", "id": "a" * 9, "function": {"name": "f", "arguments": {_PROBE: "x"}}}
            messages: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
            messages.append({"role": ANSWER, "content": "", "tool_calls": [call]})
            try:
                text = self._apply(Conversation(messages, 1, conversation.tools), messages, False, False)[0]
                self._arguments_as_text = f'"{_PROBE}": "x"' not in text and f"'{_PROBE}': 'x'" in text
            except RowError as error:
                self._arguments_as_text = isinstance(error.__cause__, TypeError)
        return self._arguments_as_text


def _probed(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str], list[str]]:
    """The messages with words of our own in the place of theirs; what each word stands for, and those in arguments."""
    words, arguments = {}, []
    for number, message in enumerate(messages):
        if message["content"]:
            word = f"{_PROBE}{number}x"
            words[word] = f"the text of message {number + 1} ({message['role']})"
            messages[number] = message = {**message, "content": word}
        calls = []
        for place, call in enumerate(message.get("tool_calls", ())):
            name, key, value = (f"{_PROBE}{number}{end}{place}x" for end in "cde")
            words[name] = f"a tool call of message {number + 1}"
            arguments += [key, value]
            calls.append({**call, "function": {"name": name, "arguments": {key: value}}})
        if calls:
            messages[number] = {**message, "tool_calls": calls}
    return messages, words, arguments


def _num_common(one: str, other: str) -> int:
    """Characters that two texts have in common at their start."""
    if other.startswith(one):
        return len(one)
    return next((place for place, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), min(len(one), len(other)))


def _stands_in(message: Mapping[str, Any], text: str) -> bool:
    """Whether a text holds what a message says, as it is or as JSON."""
    return all(words in text or json.dumps(words)[1:-1] in text for words in words_of(message))


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = []
    for call in message.get("tool_calls", []):
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**message, "tool_calls": calls} if calls else message
