"""A loss or a gradient that is not a finite number stops training, before it can spoil the weights or a checkpoint."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is infinite or no number; says the step and the tensor."""


class FiniteCheck:
    """Looks at the losses and the gradient norm of each step, in one transfer from the device.

    The norm is computed anyway. Which tensor it was is looked for only once something is wrong.

    Args:
        accelerator: whose engine trains.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._losses: list[torch.Tensor] = []

    def add(self, loss: torch.Tensor) -> None:
        """Note the loss of one batch; nothing waits for it."""
        self._losses.append(loss.detach().float())

    def check(self, step: int, model: nn.Module, norm: torch.Tensor | float | None) -> None:
        """Look at what was noted since the last call.

        An overflow that a loss scale of float16 provoked is none of training's: the scaler skips the step.

        Args:
            step: the step, counted from 1.
            model: what is trained, with its gradients.
            norm: of the gradients; None where the engine gives none.

        Raises:
            NonFiniteError: a loss or a gradient is not finite.
        """
        losses, self._losses = self._losses, []
        values = [*losses, torch.zeros(()) if norm is None else _as_tensor(norm)]
        *losses_finite, norm_finite = torch.stack([value.to(values[0].device) for value in values]).isfinite().tolist()
        loss_failed, gradient_failed = not all(losses_finite), not norm_finite or self._skips_step()
        if gradient_failed:  # all ranks are here
            loss_failed = self._on_any_rank([loss_failed])[0]
        if not loss_failed and (not gradient_failed or self._is_scaled()):
            return
        what = "the loss" if loss_failed else self._name_of_gradient(model)
        when = "" if self._uses_deepspeed else ", before the weights were changed"
        raise NonFiniteError(
            f"{what} is not finite in step {step}{when}. Where it comes again on resuming, start a new run from the last "
            "checkpoint (`--adapter_name_or_path`) with a lower `--learning_rate` or other data"
        )

    @property
    def _uses_deepspeed(self) -> bool:
        return self._accelerator.distributed_type == DistributedType.DEEPSPEED

    def _skips_step(self) -> bool:
        """DeepSpeed skips steps with infinite gradients in any type, and then keeps the norm of an earlier step."""
        return self._uses_deepspeed and self._accelerator.optimizer_step_was_skipped

    def _is_scaled(self) -> bool:
        """Whether a loss scale can be to blame, and will be lowered."""
        if self._uses_deepspeed:
            return bool(self._accelerator.deepspeed_engine_wrapped.engine.fp16_enabled())
        scaler = self._accelerator.scaler
        return scaler is not None and scaler.is_enabled() and scaler.get_scale() >= 1

    def _name_of_gradient(self, model: nn.Module) -> str:
        if self._uses_deepspeed:
            return "the gradient of a tensor (DeepSpeed drops gradients before they can be looked at)"
        named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        flags = self._on_any_rank([not bool(_local(gradient).isfinite().all()) for _, gradient in named])
        names = [name.removeprefix("module.") for (name, _), flag in zip(named, flags) if flag]
        if not names:
            return "the norm of the gradients"
        more = f" (and of {len(names) - 1} tensors before it)" if len(names) > 1 else ""
        return f"the gradient of {names[-1]}{more}"

    def _on_any_rank(self, flags: list[bool]) -> list[bool]:
        """Every rank must call it."""
        counts = self._accelerator.reduce(torch.tensor(flags, dtype=torch.float32, device=self._accelerator.device))
        return [count > 0 for count in counts.tolist()]


def on_one_mesh(model: nn.Module) -> bool:
    """Whether all gradients are sharded alike, or not at all, so that one norm spans them."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return len({gradient.device_mesh if isinstance(gradient, DTensor) else None for gradient in gradients}) <= 1


def _as_tensor(norm: torch.Tensor | float) -> torch.Tensor:
    norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
    return norm.detach().float()


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
