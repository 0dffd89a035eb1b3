"""The parallel scaling laws of the paper (arXiv 2505.10475): loss as a function of parameters N and streams P.

Both forms say that P streams act like a model with more parameters, and differ in how many more:

    L = (A / (N * gain(P)))**alpha + E
    log form (equation 5)             gain(P) = k * log P + 1, natural logarithm
    diversity form (proposition 1)    gain(P) = P**(1/alpha) * D,  D = ((P - 1) * rho + 1)**(-1/alpha)  (equation 4)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class ScalingLaw(ABC):
    """What the two forms share.

    Attributes:
        A: scale of the parameter term, in parameters.
        alpha: exponent of the parameter term.
        E: irreducible loss, in nats per token.
    """

    A: float
    alpha: float
    E: float

    form = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"`{field.name}` of a scaling law must be a number of at least 0, got {value!r}")
        if self.alpha == 0 or self.A == 0:
            raise ValueError(f"`alpha` and `A` of a scaling law must be positive, got {self.alpha} and {self.A}")

    @abstractmethod
    def gain(self, num_streams: ArrayLike) -> NDArray[np.float64]:
        """By which factor P streams multiply the parameters that the loss sees."""

    @abstractmethod
    def streams_for_gain(self, gain: float) -> float:
        """The P, a real number, whose gain is `gain`.

        Raises:
            ValueError: no number of streams has this gain.
        """

    def loss(self, num_params: ArrayLike, num_streams: ArrayLike) -> NDArray[np.float64]:
        """Predicted loss (nats per token) of models with N non-embedding parameters and P streams; broadcasts."""
        equivalent = self.equivalent_params(num_params, num_streams)
        return (self.A / equivalent) ** self.alpha + self.E

    def equivalent_params(self, num_params: ArrayLike, num_streams: ArrayLike) -> NDArray[np.float64]:
        """Parameters of the one-stream model with the same predicted loss; broadcasts."""
        sizes = np.asarray(num_params, dtype=np.float64)
        if not np.all(sizes > 0):
            raise ValueError(f"the number of parameters must be positive, got {np.min(sizes):g}")
        return sizes * self.gain(num_streams)

    def params_for_loss(self, loss: float) -> float:
        """Parameters that a one-stream model needs for this loss.

        Raises:
            ValueError: the loss is not above E, so no size reaches it.
        """
        if not loss > self.E:
            raise ValueError(f"no size reaches a loss of {loss:g}: the law's irreducible loss is {self.E:.4f}")
        return self.A / (loss - self.E) ** (1 / self.alpha)

    def streams_to_match(self, num_params: float, target_params: float) -> float:
        """The P (a real number) at which N parameters have the loss of a one-stream model of `target_params`.

        Raises:
            ValueError: the target is smaller than N, or no number of streams reaches it.
        """
        if not 0 < num_params <= target_params:
            raise ValueError(
                f"streams make a model act larger, never smaller: cannot match {target_params:g} parameters "
                f"with a model of {num_params:g}; give a target of at least that"
            )
        return self.streams_for_gain(target_params / num_params)

    def as_dict(self) -> dict[str, float | str]:
        """The form's name and its parameters, as `law_from_dict` reads them."""
        return {"form": self.form, **asdict(self)}


@dataclass(frozen=True)
class LogLaw(ScalingLaw):
    """Equation 5 of the paper. `k` is the gain per unit of log P (natural logarithm)."""

    k: float

    form = "log"

    def gain(self, num_streams: ArrayLike) -> NDArray[np.float64]:
        return self.k * np.log(_checked_streams(num_streams)) + 1

    def streams_for_gain(self, gain: float) -> float:
        if gain == 1:
            return 1.0
        exponent = (gain - 1) / self.k if self.k > 0 else math.inf
        if exponent > math.log(1e9):
            raise ValueError(
                f"no practical number of streams acts like {gain:.3g} times the parameters: "
                f"with k = {self.k:.3g} it would take more than a billion"
            )
        return math.exp(exponent)


@dataclass(frozen=True)
class DiversityLaw(ScalingLaw):
    """Proposition 1 of the paper. `rho` is the correlation between the residual errors of two streams."""

    rho: float

    form = "diversity"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho > 1:
            raise ValueError(f"`rho` is a correlation between 0 and 1, got {self.rho:g}")

    def gain(self, num_streams: ArrayLike) -> NDArray[np.float64]:
        streams = _checked_streams(num_streams)
        return (streams / ((streams - 1) * self.rho + 1)) ** (1 / self.alpha)

    def streams_for_gain(self, gain: float) -> float:
        if gain == 1:
            return 1.0
        ratio = gain**self.alpha
        if ratio * self.rho >= 1:
            raise ValueError(
                f"no number of streams acts like {gain:.3g} times the parameters: with rho = {self.rho:.3g} "
                + (f"the gain stays below {self.rho ** (-1 / self.alpha):.3g}" if self.rho < 1 else "it stays 1")
            )
        return ratio * (1 - self.rho) / (1 - ratio * self.rho)


LAWS: dict[str, type[ScalingLaw]] = {law.form: law for law in (LogLaw, DiversityLaw)}


def law_from_dict(values: Mapping[str, object]) -> ScalingLaw:
    """A law from what `ScalingLaw.as_dict` or `parscale fit-law --json` wrote; other keys are left alone."""
    form = values.get("form")
    if not isinstance(form, str) or form not in LAWS:
        raise ValueError(f"`form` of a scaling law must be one of {', '.join(LAWS)}, got {form!r}")
    parameters: dict[str, float] = {}
    for field in fields(LAWS[form]):
        value = values.get(field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"a scaling law of form {form} needs a number `{field.name}`, got {value!r}")
        parameters[field.name] = float(value)
    return LAWS[form](**parameters)


def loss_contours(
    law: ScalingLaw, num_params: ArrayLike, num_streams: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The law on a grid, for contour lines over N and P (the paper's figure 3).

    Args:
        num_params: sizes along the first axis.
        num_streams: numbers of streams along the second axis; real numbers are allowed.

    Returns:
        sizes, streams and losses, each of shape [len(num_streams), len(num_params)].
    """
    sizes, streams = np.meshgrid(np.asarray(num_params, float), np.asarray(num_streams, float))
    return sizes, streams, law.loss(sizes, streams)


def _checked_streams(num_streams: ArrayLike) -> NDArray[np.float64]:
    streams = np.asarray(num_streams, dtype=np.float64)
    if not np.all(streams >= 1):
        raise ValueError(f"the number of streams must be at least 1, got {np.min(streams):g}")
    return streams
