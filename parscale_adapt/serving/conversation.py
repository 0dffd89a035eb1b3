"""A conversation with one model in memory, whose adapters are switched while it goes on."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from .generation import Messages, context_length, lay_out, token_choice


@dataclass(frozen=True)
class Voice:
    """What can answer: an adapter on the backbone, or, without a `peft_name`, the model without adapters."""

    name: str
    num_streams: int
    peft_name: str | None = None


class Conversation:
    """Questions and answers so far, and the voice that gives the next answer.

    Args:
        model: with all adapters loaded, in evaluation mode.
        tokenizer: its chat template lays out the conversation; without one it is plain text that goes on.
        voices: the first one answers first.
        max_new_tokens: of an answer.
        temperature: 0 takes the most likely token each time.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        voices: list[Voice],
        max_new_tokens: int = 512,
        temperature: float = 0.0,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.voices = voices
        self.messages: Messages = []
        self._cache: Cache | None = None
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self.use(voices[0])

    def use(self, voice: Voice) -> None:
        """Let this voice answer from now on. It reads the whole conversation anew, since keys and values are its own."""
        if voice.peft_name is not None:
            self.model.set_adapter(voice.peft_name)
        self.voice = voice
        self._forget_cache()

    def with_streams(self, num_streams: int) -> Voice:
        """The voice of so many streams; 1 is the model without adapters.

        Raises:
            ValueError: there is none, or several adapters have as many.
        """
        if num_streams == 1:
            return self.plain
        found = [voice for voice in self.voices if voice.num_streams == num_streams]
        if len(found) != 1:
            names = ", ".join(f"{voice.name} (P = {voice.num_streams})" for voice in found or self.voices)
            problem = "Several adapters have" if found else "No adapter has"
            raise ValueError(f"{problem} {num_streams} streams: choose by name, with /use, among {names}.")
        return found[0]

    def named(self, name: str) -> Voice:
        """The voice of that name.

        Raises:
            ValueError: there is none.
        """
        for voice in self.voices:
            if voice.name == name:
                return voice
        raise ValueError(f"There is no {name!r}: choose among {', '.join(voice.name for voice in self.voices)}.")

    @property
    def plain(self) -> Voice:
        """The model without adapters.

        Raises:
            ValueError: its streams are its own and can't be switched off.
        """
        for voice in self.voices:
            if voice.peft_name is None and voice.num_streams == 1:
                return voice
        raise ValueError(
            "This checkpoint owns its streams, they can't be switched off: chat with its adapter instead."
        )

    def reset(self) -> None:
        """Forget everything that was said."""
        self.messages.clear()

    def say(self, text: str) -> str:
        """Take a question, print the answer as it comes, and return it.

        Raises:
            ValueError: the conversation with its answer is longer than the model can read, or its chat template refuses it;
                the question is dropped.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        inputs = lay_out(self.tokenizer, messages).to(self.model.device)
        num_tokens, num_new = inputs["input_ids"].shape[1], self._max_new_tokens
        longest = context_length(self.model)
        if longest is not None and num_tokens + num_new > longest:
            raise ValueError(
                f"The conversation has {num_tokens} tokens, and with an answer of up to {num_new} it is longer than the "
                f"{longest} that the model can read: /reset it, or start with a smaller --max-new-tokens."
            )
        answer = self._generate(inputs)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def _generate(self, inputs: Any) -> str:
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        prompt = inputs["input_ids"][0]
        with self._speaking(), torch.no_grad():
            output = self.model.generate(
                **inputs,
                **token_choice(self.model, self._temperature, [int(torch.randint(2**31, ()))]),
                max_new_tokens=self._max_new_tokens,
                past_key_values=self._cache_for(prompt),
                streamer=streamer,
                return_dict_in_generate=True,
            )
        sequence = output.sequences[0]
        self._cache, self._cached_tokens = output.past_key_values, sequence[:-1]
        return self.tokenizer.decode(sequence[len(prompt) :], skip_special_tokens=True)

    def _speaking(self) -> AbstractContextManager[Any]:
        if isinstance(self.model, PeftModel) and self.voice.peft_name is None:
            return self.model.disable_adapter()
        return nullcontext()

    def _cache_for(self, prompt: torch.Tensor) -> Cache | None:
        """The cache of the answer before, if what it holds is how this prompt begins."""
        known = len(self._cached_tokens)
        return self._cache if known and torch.equal(prompt[:known], self._cached_tokens) else None

    def _forget_cache(self) -> None:
        self._cache = None
        self._cached_tokens = torch.empty(0, dtype=torch.long)
