"""One architecture at a tiny size, plain and with streams, and the inputs that the checks feed to it."""

import inspect
import traceback
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel, PeftModelForQuestionAnswering, get_peft_model
from tiny_architectures import SEQ_CLS, VOCABULARY, answer_of, task_of, tiny_model
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from parscale_adapt import ParScaleConfig


Inputs = dict[str, torch.Tensor]

NUM_STREAMS, NUM_PREFIX_TOKENS = 3, 3
BATCH_SIZE, LENGTH, NUM_PADDING = 2, 20, 3
SHORT_LENGTH = 9  # few queries take another road through attention than many
PADDING_TOKEN = 5  # not the configuration's, whose embedding may be zero


class NotApplicable(Exception):
    """The plain backbone lacks the property itself; the message says what it lacks."""


class Broken(AssertionError):
    """The property doesn't hold; the message says how."""


class Case:
    """A plain backbone and the same one with an adapter, and a head where PEFT trains one, that clearly change its output.

    Args:
        model_type: a causal LM of that type, or as in `tiny_architectures.OTHER_TASKS`.
        implementation: of attention.

    Raises:
        ValueError: the package refuses the backbone.
    """

    def __init__(self, model_type: str, implementation: str):
        self.model_type = model_type
        self.task = task_of(model_type)
        self.implementation = implementation
        self.backbone = self.fresh_backbone()
        self.model = self.adapted()

    def fresh_backbone(self, implementation: str | None = None) -> PreTrainedModel:
        """The plain backbone, built again with the same weights."""
        return tiny_model(self.model_type, implementation or self.implementation)

    def adapted(self) -> PeftModel:
        """A newly built backbone with the same adapter as `model`."""
        backbone = self.fresh_backbone()
        torch.manual_seed(1)
        config = ParScaleConfig(
            task_type=self.task, num_streams=NUM_STREAMS, num_prefix_tokens=NUM_PREFIX_TOKENS, init_std=0.5
        )
        model = get_peft_model(backbone, config).eval()
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.data += torch.randn_like(parameter)
        return model

    @property
    def answers_by_token(self) -> bool:
        """Whether logits are `[B, T, ...]`, and not `[B, labels]` of each row's last token."""
        return self.task != SEQ_CLS

    @cached_property
    def input_ids(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        return torch.randint(3, VOCABULARY, (BATCH_SIZE, LENGTH), generator=generator)

    @cached_property
    def takes_positions(self) -> bool:
        """Whether the plain backbone can be told positions."""
        parameters = inspect.signature(self.backbone.forward).parameters.values()
        return any(p.name == "position_ids" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)

    @property
    def plain(self) -> Inputs:
        """Rows without padding or mask."""
        return {"input_ids": self.input_ids}

    @property
    def ragged(self) -> Inputs:
        """Two rows, the first of which starts with masked tokens."""
        mask = torch.ones_like(self.input_ids)
        mask[0, :NUM_PADDING] = 0
        return self._masked(self.input_ids, mask)

    @property
    def short(self) -> Inputs:
        """The start of `ragged`."""
        return {name: tensor[:, :SHORT_LENGTH] for name, tensor in self.ragged.items()}

    def moved_right(self, num_padding: int) -> Inputs:
        """Both rows behind `num_padding` masked tokens."""
        padding = (num_padding, 0)
        return self._masked(F.pad(self.input_ids, padding), F.pad(torch.ones_like(self.input_ids), padding))

    def padded(self, left: int, right: int) -> Inputs:
        """Both rows between so many of the configuration's padding tokens, which pooling looks for."""
        padding = (left, right)
        mask = F.pad(torch.ones_like(self.input_ids), padding)
        return self._masked(F.pad(self.input_ids, padding), mask, self.backbone.config.pad_token_id)

    def _masked(self, input_ids: torch.Tensor, mask: torch.Tensor, padding_token: int = PADDING_TOKEN) -> Inputs:
        inputs = {"input_ids": input_ids.masked_fill(mask == 0, padding_token), "attention_mask": mask}
        if self.takes_positions:  # as `generate` tells them
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return inputs


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Finite logits `[B, T, vocabulary]`, or what [`answer_of`] takes for them, computed without cache."""
    if isinstance(model, PeftModelForQuestionAnswering):  # which drops `position_ids`, whatever the method
        model = model.base_model
    logits = answer_of(model(**inputs, use_cache=False))
    if not logits.isfinite().all():
        raise Broken("the logits are not finite")
    return logits


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value where that is above 1."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def describe_error(error: Exception) -> str:
    """One line: the message, and for errors that no check raised itself the type and where it was raised."""
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else ""
    if isinstance(error, Broken | NotApplicable):
        return message
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {message} ({Path(frame.filename).name}:{frame.lineno})"
