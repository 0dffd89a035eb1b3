"""Logits that are no numbers give scores all the same: of nothing but NaN, the first choice counts as the likeliest."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def only_finite(model: PreTrainedModel | PeftModel, what: str) -> Iterator[None]:
    """Inside, the logits of all forwards are looked at; nothing waits for it before the end.

    Args:
        model: a causal LM, with adapters or without.
        what: is measured, for the error.

    Raises:
        ValueError: on the way out, logits were NaN or infinite.
    """
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model  # `generate` calls this one
    highest: list[torch.Tensor] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        found = output.logits.detach().amax()  # NaN where one is NaN
        highest[:] = [torch.maximum(found, *highest) if highest else found]

    handle = causal_lm.register_forward_hook(look)
    try:
        yield
    except RuntimeError as error:  # nothing can be sampled from them
        _refuse(highest, what, error)
        raise
    finally:
        handle.remove()
    _refuse(highest, what, None)


def _refuse(highest: list[torch.Tensor], what: str, cause: Exception | None) -> None:
    if highest and not highest[0].isfinite():
        raise ValueError(
            f"The logits of {what} are no finite numbers, so that no score means anything: the weights are damaged, or their "
            "sums overflow in this type. Give another `dtype`, or leave the model out; the scores that are finished stay."
        ) from cause
