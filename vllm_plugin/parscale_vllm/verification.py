"""At start-up what is served is compared with the reference of the export, on the cache that is served."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform

from .reference import Reference
from .scratch_run import ScratchRun


logger = logging.getLogger("vllm.parscale")

# The export's tolerance is that of its own kernels; others may round a little more.
_ROUNDINGS = 16
# A control is told apart where it differs by more than so many times what the dtype rounds. What is served must then be
# nearer to the reference, by this ratio.
_TOLD_APART, _NEARER = 2, 0.8


@dataclass(frozen=True)
class Comparison:
    """Logits `[N, V]` in float32.

    Args:
        expected: of the reference.
        served: of the engine.
        controls: of what must not be served, by their names.
        allowed: the largest difference; None where the engine computes in another dtype than the export did.
        rounding: root mean square of what the dtype rounds, about.
    """

    expected: torch.Tensor
    served: torch.Tensor
    controls: dict[str, torch.Tensor]
    allowed: float | None
    rounding: float

    def problem(self) -> str | None:
        """What shows that another model is served; None if nothing does.

        Half precision may round as much as damage to the streams changes, so that logits near the reference don't say
        enough there.
        """
        if not self.served.isfinite().all():
            return "its logits are infinite or no numbers"
        largest = float((self.served - self.expected).abs().max())
        if self.allowed is not None and largest > self.allowed:
            return f"logits of the reference prompts are off by {largest:.3g}, and {self.allowed:.3g} is allowed"
        error = _rms(self.served - self.expected)
        for name, control in self.controls.items():
            if torch.equal(control, self.served):
                return f"its logits are those of {name}"
            is_apart = _rms(control - self.served) > _TOLD_APART * self.rounding
            if is_apart and not error < _NEARER * _rms(control - self.expected):
                return f"its logits are no nearer to those of the export than those of {name}"
        return None

    def __str__(self) -> str:
        errors = {"served": self.served, **self.controls}
        return ", ".join(f"{name} is off by {_rms(logits - self.expected):.3g}" for name, logits in errors.items())


def _rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def verify(model: Any, reference: Reference) -> None:
    """Compare a model with its reference, on blocks of the bound cache that no request has taken yet.

    Raises:
        ValueError: another model would be served.
    """
    comparison = _compare(model, reference)
    if comparison is None:
        return
    problem = comparison.problem()
    if problem is not None:
        raise ValueError(
            f"What vLLM would serve is not what was exported: {problem}; check the export with `parscale verify`, and "
            "report it with the versions of vLLM and parscale-vllm."
        )
    logger.info(
        "Verified in %d streams; root mean square of %d x %d logits: %s.",
        model.layout.num_streams,
        *comparison.expected.shape,
        comparison,
    )


def _compare(model: Any, reference: Reference) -> Comparison | None:
    """None on ranks that get no logits."""
    dtype, exact = model.model_config.dtype, "logits_float32"
    kind = exact if dtype is torch.float32 and exact in reference.tolerances else "logits"
    run = ScratchRun(model)
    rows = list(reference.rows(kind, run.num_tokens))
    with torch.no_grad(), set_current_vllm_config(model.vllm_config), current_platform.inference_mode():
        for layer in model.attention_layers:
            layer.write_prefix(empty=True)
        without_prefix = [run.logits(tokens, len(logits))["served"] for tokens, logits in rows]
        for layer in model.attention_layers:
            layer.write_prefix()
        found = [run.logits(tokens, len(logits)) for tokens, logits in rows]
    if found[0]["served"] is None:
        return None
    expected = torch.cat([row.logits for row in rows])
    rounding = torch.finfo(dtype).eps * float(expected.abs().max())
    allowed = max(reference.tolerances[kind], _ROUNDINGS * rounding)
    if kind == "logits" and exact in reference.tolerances:
        rounding = _rms(expected - torch.cat([row.logits for row in reference.rows(exact, run.num_tokens)]))
    return Comparison(
        expected,
        torch.cat([logits["served"] for logits in found]),
        {"empty prefixes": torch.cat(without_prefix), "the first stream": torch.cat([one["single"] for one in found])},
        allowed if reference.tensors[kind].dtype is dtype else None,
        rounding,
    )
