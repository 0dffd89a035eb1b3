"""What answers are made of, in the terminal and on the page: the prompt, its room, and how tokens are chosen."""

from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import (
    BatchEncoding,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


Messages = list[dict[str, str]]


def lay_out(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> BatchEncoding:
    """The inputs of a conversation that waits for an answer, by the chat template if there is one.

    Raises:
        ValueError: the template refuses the conversation.
    """
    if tokenizer.chat_template is None:
        return tokenizer(plain_text(messages), return_tensors="pt")
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    except TemplateError as error:
        raise ValueError(f"The chat template of this model refuses the conversation: {error}") from error


def plain_text(messages: Messages) -> str:
    """The conversation as one text: each answer goes on from its question, all else starts a line."""
    text = ""
    for message in messages:
        text += "\n" * (bool(text) and message["role"] != "assistant") + message["content"]
    return text


def context_length(model: PreTrainedModel) -> int | None:
    """How many tokens the model can read, where its configuration says it."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def token_choice(model: PreTrainedModel, temperature: float, seeds: Sequence[int]) -> dict[str, Any]:
    """Keywords of `generate` that say how tokens are chosen.

    Args:
        model: whose own `top_k`, `top_p` and `min_p` hold where tokens are drawn.
        temperature: 0 takes the most likely token each time.
        seeds: of the draws, one for each sample of the batch; a sample draws the same whatever stands beside it.
    """
    # Of a model's own settings for sampling, those that greedy decoding has no use for are taken back.
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
    if temperature > 0:
        choice["logits_processor"] = LogitsProcessorList([_SeededDraw(_warpers(model, temperature), seeds)])
    return choice


def _warpers(model: PreTrainedModel, temperature: float) -> LogitsProcessorList:
    """In the order in which `generate` has them."""
    own = model.generation_config
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(temperature))]
    if own.top_k:
        warpers.append(TopKLogitsWarper(own.top_k))
    if own.top_p is not None and own.top_p < 1:
        warpers.append(TopPLogitsWarper(own.top_p))
    if own.min_p is not None:
        warpers.append(MinPLogitsWarper(own.min_p))
    return LogitsProcessorList(warpers)


class _SeededDraw(LogitsProcessor):
    """Makes greedy decoding draw: the largest of scores with Gumbel noise on them is a draw from their softmax.

    `generate` itself draws from torch's one generator, which threads and samples of a batch share.
    """

    def __init__(self, warpers: LogitsProcessorList, seeds: Sequence[int]):
        self.warpers = warpers
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: Any) -> Any:
        """Scores `[B, V]`, changed."""
        scores = self.warpers(input_ids, scores)
        waits = [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self.generators]
        return scores - torch.stack(waits).to(scores.device).clamp(min=torch.finfo(torch.float32).tiny).log()
