"""The held-out loss as a number that compares: the cross-entropy of the next token, however a run is trained."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from trl import SFTTrainer


@contextmanager
def plain_cross_entropy(trainer: SFTTrainer) -> Iterator[None]:
    """Let TRL's loss be the plain cross-entropy inside: no other loss type, no smoothing, no router loss.

    NEFTune's noise and what kernels do to the loss are no part of it anyway while the model is in evaluation mode.
    """
    config = trainer.model.config.get_text_config()
    loss_type = "chunked_nll" if trainer.args.loss_type == "chunked_nll" else "nll"
    with ExitStack() as stack:
        for owner, name, value in (
            (trainer.args, "loss_type", loss_type),
            (trainer, "compute_loss_func", None),
            (trainer, "label_smoother", None),
            (trainer, "aux_loss_enabled", False),
            (config, "output_router_logits", False),
        ):
            if hasattr(owner, name):
                stack.enter_context(_set(owner, name, value))
        yield


@contextmanager
def _set(owner: object, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
