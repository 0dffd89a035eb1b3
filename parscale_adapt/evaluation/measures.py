"""What a model can be scored on. A measure knows what decides its numbers, and gives the numbers of one model."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .bootstrap import Metric


@dataclass
class Scores:
    """The numbers of one model on one measure.

    Args:
        metrics: by name.
        items: one mapping for each item, in the measure's order: what became of it.
    """

    metrics: dict[str, Metric]
    items: list[dict[str, Any]] = field(default_factory=list)


class Measure(Protocol):
    """One thing that is measured."""

    @property
    def name(self) -> str:
        """In tables; unique in an evaluation."""

    @property
    def kind(self) -> str:
        """One of "task", "text", "forgetting" and "code"."""

    @property
    def generates(self) -> bool:
        """Whether models write answers, so that beams make a difference."""

    def content(self) -> dict[str, Any]:
        """All that decides the numbers of a given model, JSON-able."""

    def score(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_beams: int) -> Scores:
        """The numbers of a model."""
