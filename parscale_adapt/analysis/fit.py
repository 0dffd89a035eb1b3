"""Fit a scaling law to training runs, with bootstrap intervals.

As in the paper (section 3.2): the Huber loss (delta 0.001) of the error in log loss, minimised by L-BFGS-B from a
grid of starts. Gradients are analytic and the parameters are rescaled, which finds the same optimum in less time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from .runs import Run, as_arrays
from .scaling_law import LAWS, DiversityLaw, LogLaw, ScalingLaw


HUBER_DELTA = 1e-3
MIN_SIZES = 3
# Starts, around which a law of a language model is likely: E as a share of the lowest loss, alpha, and k or rho.
START_GRID = [
    (share, alpha, gain) for share in (0.3, 0.6, 0.9) for alpha in (0.1, 0.3, 0.9) for gain in (0.1, 0.5, 0.9)
]
BOUNDS = [(-20.0, 20.0), (-30.0, 30.0), (1e-3, 10.0)]
GAIN_BOUNDS = {"log": (0.0, 100.0), "diversity": (0.0, 1.0)}
GAIN_NAMES = {"log": "k", "diversity": "rho"}

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """A fitted law and how well it fits.

    Attributes:
        law: the law.
        runs: the points it was fitted to.
        predicted: the law's loss for each run (nats per token).
        r2: share of the variance of the losses that the law explains.
        intervals: bootstrap interval of each parameter; empty when none were asked for.
        confidence: share of the bootstrap fits inside each interval.
        num_bootstrap: number of bootstrap fits.
        seed: seed of the bootstrap.
        undetermined: parameters that ended on the edge of their range, which the runs therefore do not determine.
    """

    law: ScalingLaw
    runs: tuple[Run, ...]
    predicted: Array
    r2: float
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    confidence: float = 0.95
    num_bootstrap: int = 0
    seed: int = 0
    undetermined: tuple[str, ...] = ()

    @property
    def residuals(self) -> Array:
        """Measured minus predicted loss of each run, in nats per token."""
        return as_arrays(self.runs)[2] - self.predicted


def fit_law(
    runs: Sequence[Run], form: str = "log", num_bootstrap: int = 500, seed: int = 0, confidence: float = 0.95
) -> Fit:
    """Fit one form of the law.

    The intervals are percentile intervals of a residual bootstrap: the residuals in log loss, widened for the
    degrees of freedom that the fit used, are drawn with replacement and added to the fitted curve, and the law is
    fitted again. (Drawing runs instead would often lose a whole size or P from such small designs.)

    Args:
        runs: at least five runs, with two numbers of streams and three sizes at one of them.
        form: `log` (equation 5) or `diversity` (proposition 1).
        num_bootstrap: bootstrap fits; 0 for no intervals.
        seed: seed of the bootstrap.
        confidence: share of the bootstrap fits inside each interval.

    Raises:
        ValueError: the runs cannot determine the law, or an argument is out of range.
    """
    if form not in LAWS:
        raise ValueError(f"`form` must be one of {', '.join(LAWS)}, got `{form}`")
    if num_bootstrap < 0 or not 0 < confidence < 1:
        raise ValueError(
            f"the number of bootstrap fits must be at least 0 and the confidence between 0 and 1, "
            f"got {num_bootstrap} and {confidence}"
        )
    check_identifiable(runs)
    problem = _Problem.of(runs, form)
    log_losses = np.log(as_arrays(runs)[2])
    theta = problem.minimise(log_losses, problem.starts())
    law = problem.law(theta)
    predicted = law.loss(problem.num_params, problem.num_streams)
    return Fit(
        law=law,
        runs=tuple(runs),
        predicted=predicted,
        r2=_r2(np.exp(log_losses), predicted),
        intervals=_bootstrap(problem, theta, log_losses, num_bootstrap, seed, confidence) if num_bootstrap else {},
        confidence=confidence,
        num_bootstrap=num_bootstrap,
        seed=seed,
        undetermined=problem.undetermined(theta),
    )


def check_identifiable(runs: Sequence[Run]) -> None:
    """Refuse runs from which no method could tell the law's four parameters.

    Sizes are counted among runs with equal P, and sizes within 5% of each other count once: an adapter changes the
    parameter count a little with P, and one backbone with several P is still one size.

    Raises:
        ValueError: too few runs, sizes, numbers of streams or losses.
    """
    sizes_by_streams: dict[int, set[float]] = {}
    for run in runs:
        sizes_by_streams.setdefault(run.num_streams, set()).add(run.num_params)
    num_sizes = max((_num_distinct(sizes) for sizes in sizes_by_streams.values()), default=0)
    if len(runs) < 5:
        raise ValueError(f"a law of four parameters needs at least five runs, got {len(runs)}: add runs")
    if num_sizes < MIN_SIZES:
        raise ValueError(
            f"the law is not identifiable from {num_sizes} model size{'s' * (num_sizes > 1)}: A, alpha and E need at "
            f"least {MIN_SIZES} different sizes with the same number of streams; add runs of other sizes"
        )
    if len({run.loss for run in runs}) == 1:
        raise ValueError(
            f"every run has the same loss, {runs[0].loss:g}, so there is nothing to fit: check the losses"
        )
    if len(sizes_by_streams) < 2:
        raise ValueError(
            f"every run has {next(iter(sizes_by_streams))} stream(s), so what streams gain cannot be fitted: "
            "add runs with another number of streams"
        )


@dataclass(frozen=True)
class _Problem:
    """The least-Huber problem in rescaled parameters theta = (log E, log reducible loss at the reference size, alpha, k or rho).

    The reducible loss is exp(theta[1] - alpha * log(N / reference) - h(P)), with h(P) = alpha * log gain(P).
    """

    form: str
    num_params: Array
    num_streams: Array
    losses: Array
    reference: float

    @classmethod
    def of(cls, runs: Sequence[Run], form: str) -> "_Problem":
        num_params, num_streams, losses = as_arrays(runs)
        return cls(form, num_params, num_streams, losses, float(np.exp(np.log(num_params).mean())))

    def starts(self) -> list[Array]:
        lowest, middle = self.losses.min(), np.median(self.losses)
        return [
            np.array([math.log(share * lowest), math.log(middle - share * lowest), alpha, gain])
            for share, alpha, gain in START_GRID
        ]

    def bounds(self) -> list[tuple[float, float]]:
        return [*BOUNDS, GAIN_BOUNDS[self.form]]

    def minimise(self, log_losses: Array, starts: Sequence[Array]) -> Array:
        """The best of the local optima that L-BFGS-B finds from the starts."""
        results = [
            minimize(
                self.objective,
                start,
                args=(log_losses,),
                jac=True,
                method="L-BFGS-B",
                bounds=self.bounds(),
                options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-9},
            )
            for start in starts
        ]
        best = min(results, key=lambda result: float(result.fun))
        if not math.isfinite(best.fun):
            raise ValueError("the fit found no finite optimum: check the losses for outliers")
        return np.asarray(best.x, dtype=np.float64)

    def objective(self, theta: Array, log_losses: Array) -> tuple[float, Array]:
        """Huber loss in units of delta squared, and its gradient."""
        h, h_alpha, h_gain = self.log_gain_terms(theta[2], theta[3])
        log_size = np.log(self.num_params / self.reference)
        irreducible = np.exp(theta[0])
        reducible = np.exp(np.clip(theta[1] - theta[2] * log_size - h, -700, 700))
        predicted = irreducible + reducible
        error = (np.log(predicted) - log_losses) / HUBER_DELTA
        size = np.abs(error)
        value = np.where(size <= 1, error**2 / 2, size - 0.5).sum()
        slope = np.clip(error, -1, 1) / HUBER_DELTA / predicted
        d_reducible = slope * reducible
        gradient = np.array(
            [
                (slope * irreducible).sum(),
                d_reducible.sum(),
                -(d_reducible * (log_size + h_alpha)).sum(),
                -(d_reducible * h_gain).sum(),
            ]
        )
        return float(value), gradient

    def log_gain_terms(self, alpha: float, gain: float) -> tuple[Array, Array, Array]:
        """alpha * log gain(P) and its derivatives with respect to alpha and to k or rho."""
        if self.form == LogLaw.form:
            log_streams = np.log(self.num_streams)
            factor = gain * log_streams + 1
            return alpha * np.log(factor), np.log(factor), alpha * log_streams / factor
        others = self.num_streams - 1
        variance = others * gain + 1
        return np.log(self.num_streams / variance), np.zeros_like(others), -others / variance

    def law(self, theta: Array) -> ScalingLaw:
        log_e, log_reducible, alpha, gain = (float(value) for value in theta)
        # Bootstrap fits may run alpha to its bound, where A leaves the range of a float.
        scale = self.reference * math.exp(min(max(log_reducible / alpha, -600.0), 600.0))
        if self.form == LogLaw.form:
            return LogLaw(A=scale, alpha=alpha, E=math.exp(log_e), k=gain)
        return DiversityLaw(A=scale, alpha=alpha, E=math.exp(log_e), rho=gain)

    def undetermined(self, theta: Array) -> tuple[str, ...]:
        names = ("E", "A", "alpha", GAIN_NAMES[self.form])
        return tuple(
            name
            for name, value, (low, high) in zip(names, theta, self.bounds())
            if value - low < 1e-6 or high - value < 1e-6
        )


def _bootstrap(
    problem: _Problem, theta: Array, log_losses: Array, num_bootstrap: int, seed: int, confidence: float
) -> dict[str, tuple[float, float]]:
    law = problem.law(theta)
    fitted = np.log(law.loss(problem.num_params, problem.num_streams))
    residuals = log_losses - fitted
    residuals = (residuals - residuals.mean()) * math.sqrt(len(residuals) / max(len(residuals) - len(theta), 1))
    generator = np.random.default_rng(seed)
    names = [name for name in law.as_dict() if name != "form"]
    draws = np.empty((num_bootstrap, len(names)))
    for index in range(num_bootstrap):
        resampled = fitted + generator.choice(residuals, size=len(residuals))
        refitted = problem.law(problem.minimise(resampled, [theta]))
        draws[index] = [getattr(refitted, name) for name in names]
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return {name: (float(low[index]), float(high[index])) for index, name in enumerate(names)}


def _num_distinct(sizes: set[float]) -> int:
    return 1 + int((np.diff(np.log(sorted(sizes))) > 0.05).sum())


def _r2(measured: Array, predicted: Array) -> float:
    return 1 - float(((measured - predicted) ** 2).sum() / ((measured - measured.mean()) ** 2).sum())
