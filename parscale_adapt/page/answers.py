"""Answers of one model in memory to several visitors: one token for each of them in turn."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ..analysis.token_streams import TokenStreams, token_streams
from ..core.weight_statistics import stream_statistics
from ..serving.conversation import Voice
from ..serving.generation import Messages, context_length, lay_out, token_choice
from ..serving.turns import Turns
from .pieces import TextPieces
from .questions import Question


MAX_ANSWERS = 8
_PLAIN = "__base__"  # PEFT's name for the backbone without adapters
Emit = Callable[[dict[str, Any]], None]


class Answers:
    """What a model says, to any number of threads.

    Every sample names its voice for itself (PEFT's `adapter_names`), so that no thread sees which adapter another one
    uses, and whoever generates lets the others have a turn after each token.

    Args:
        model: with all adapters loaded, in evaluation mode.
        tokenizer: lays out conversations.
        voices: what can answer.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, voices: Sequence[Voice]
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.voices = sorted(voices, key=lambda voice: voice.num_streams)
        self._turns = Turns()
        self._places = threading.BoundedSemaphore(MAX_ANSWERS)

    @property
    def context(self) -> int | None:
        """Tokens that the model can read."""
        return context_length(self.model)

    def named(self, names: object) -> list[Voice]:
        """The voices of these names.

        Raises:
            ValueError: there is no such voice, or no name.
        """
        known = {voice.name: voice for voice in self.voices}
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError("`voices` must be a list of names, at least one.")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"There is no voice {unknown[0]!r}: choose among {', '.join(known)}.")
        return [known[name] for name in names]

    def answer(self, question: Question, voices: Sequence[Voice], emit: Emit, stopped: threading.Event) -> None:
        """Let all `voices` answer side by side, in one batch.

        Args:
            question: what is asked.
            voices: one sample of the batch each.
            emit: gets `start`, `tokens` again and again, and `end`.
            stopped: once it is set, no more tokens are generated.

        Raises:
            ValueError: the prompt leaves no room for an answer, or as many answers as possible are under way.
        """
        if not self._places.acquire(blocking=False):
            raise ValueError(f"{MAX_ANSWERS} answers are being given already: ask again when one of them has ended.")
        try:
            with self._turns.mine():
                if not stopped.is_set():
                    self._generate(question, voices, emit, stopped)
        finally:
            self._places.release()

    def _generate(self, question: Question, voices: Sequence[Voice], emit: Emit, stopped: threading.Event) -> None:
        prompt = self._prompt(question.messages)
        room = min(question.max_new_tokens, self._room(len(prompt)))
        emit({"event": "start", "prompt_tokens": len(prompt), "max_new_tokens": room})
        steps = _Steps([_Row(self.tokenizer, self._ends()) for _ in voices], self._turns, emit, stopped)
        with torch.no_grad():
            output = self.model.generate(
                input_ids=prompt.repeat(len(voices), 1),
                attention_mask=torch.ones(len(voices), len(prompt), dtype=torch.long, device=prompt.device),
                **token_choice(self.model, question.temperature, [question.seed] * len(voices)),
                **self._speaking(voices),
                max_new_tokens=room,
                stopping_criteria=StoppingCriteriaList([steps]),
                return_dict_in_generate=True,
            )
        share = _cache_bytes(output.past_key_values) / (len(voices) * max(voice.num_streams for voice in voices))
        figures = [row.figures(stopped.is_set()) for row in steps.rows]
        answers = [{**row, "cache_bytes": share * voice.num_streams} for row, voice in zip(figures, voices)]
        emit({"event": "end", "answers": answers, "first_token_seconds": steps.first_token_seconds})

    def streams(self, messages: Messages, voice: Voice, tokens: Sequence[int]) -> dict[str, Any]:
        """What the streams of a voice say at the tokens of an answer, by one plain forward.

        Raises:
            ValueError: the voice has one stream, or prompt and answer are longer than the model can read.
        """
        if voice.num_streams == 1:
            raise ValueError(
                f"{voice.name} has one stream, so nothing is weighed: choose an answer of several streams."
            )
        with self._turns.mine():
            prompt = self._prompt(messages)
            self._room(len(prompt) + len(tokens) - 1)
            if isinstance(self.model, PeftModel):
                self.model.set_adapter(voice.peft_name)
            found = token_streams(self.model, prompt, torch.tensor(tokens, device=prompt.device))
            return self._described(found, tokens)

    def _described(self, found: TokenStreams, tokens: Sequence[int]) -> dict[str, Any]:
        pieces = TextPieces(self.tokenizer)
        tops = [[self.tokenizer.decode([token]) for token in row] for row in found.top_tokens.tolist()]
        columns = zip(
            tokens,
            found.weights.tolist(),
            found.entropy.tolist(),
            zip(*tops),
            found.top_probs.T.tolist(),
            found.token_probs.T.tolist(),
        )
        rows = [
            {
                "text": pieces.add(token),
                "token": self.tokenizer.decode([token]),
                "weights": weights,
                "entropy": entropy,
                "tops": list(top),
                "top_probs": top_probs,
                "token_probs": token_probs,
            }
            for token, weights, entropy, top, top_probs, token_probs in columns
        ]
        return {
            "num_streams": found.weights.shape[1],
            "tokens": rows,
            "statistics": stream_statistics(found.weights[None]),
        }

    def _prompt(self, messages: Messages) -> torch.Tensor:
        """`[T]` token ids."""
        return lay_out(self.tokenizer, messages)["input_ids"][0].to(self.model.device)

    def _room(self, num_tokens: int) -> int:
        if self.context is None:
            return 2**31
        if num_tokens >= self.context:
            raise ValueError(
                f"The conversation has {num_tokens} tokens, and the model reads {self.context} with its answer: start a "
                "new conversation, or ask for less."
            )
        return self.context - num_tokens

    def _ends(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return set() if ends is None else {ends} if isinstance(ends, int) else {*ends}

    def _speaking(self, voices: Sequence[Voice]) -> dict[str, Any]:
        if not isinstance(self.model, PeftModel):
            return {}
        return {"adapter_names": [voice.peft_name or _PLAIN for voice in voices]}


class _Row:
    """One answer as it comes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: set[int]):
        self.tokens: list[int] = []
        self.seconds = 0.0  # from the first token to the last
        self.has_ended = False
        self._tokenizer = tokenizer
        self._ends = ends
        self._pieces = TextPieces(tokenizer)

    def add(self, token: int, seconds: float) -> str | None:
        """The text of the next token, None once the answer has ended."""
        if self.has_ended:
            return None
        self.seconds += seconds if self.tokens else 0
        self.tokens.append(token)
        self.has_ended = token in self._ends
        return self._pieces.add(token)

    def figures(self, was_stopped: bool) -> dict[str, Any]:
        """The whole answer, with what it took after the first token."""
        num_steps = len(self.tokens) - 1
        measured = num_steps > 0 and self.seconds > 0
        return {
            "tokens": self.tokens,
            "text": self._tokenizer.decode(self.tokens, skip_special_tokens=True),
            "ended": "end" if self.has_ended else "stopped" if was_stopped else "length",
            "tokens_per_second": num_steps / self.seconds if measured else None,
            "ms_per_token": 1000 * self.seconds / num_steps if measured else None,
        }


class _Steps(StoppingCriteria):
    """Sees each token, hands it on, and lets others have their turn; that isn't counted as time of this answer."""

    def __init__(self, rows: list[_Row], turns: Turns, emit: Emit, stopped: threading.Event):
        self.rows = rows
        self.first_token_seconds: float | None = None
        self._turns = turns
        self._emit = emit
        self._stopped = stopped
        self._since = time.perf_counter()

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        tokens = input_ids[:, -1].tolist()
        seconds = time.perf_counter() - self._since
        if self.first_token_seconds is None:
            self.first_token_seconds = seconds
        shown = [None if row.has_ended else token for row, token in zip(self.rows, tokens)]
        texts = [row.add(token, seconds) for row, token in zip(self.rows, tokens)]
        self._emit({"event": "tokens", "tokens": shown, "texts": texts})
        self._turns.pass_on()
        self._since = time.perf_counter()
        return torch.full((len(self.rows),), self._stopped.is_set(), device=input_ids.device)  # type: ignore[return-value]


def _cache_bytes(cache: Cache | None) -> int:
    """What the tensors of a cache take."""
    held = [value for layer in cache.layers for value in vars(layer).values()] if cache is not None else []
    for value in held:  # which grows on the way: recurrent layers may hold several states
        held += value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    tensors = {id(value): value for value in held if torch.is_tensor(value)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
