"""The two forms of the law, their fit to the paper's points, and recovery of a known law."""

import os


# On a busy machine the fit's tiny linear systems wait for BLAS threads; this must precede the import of scipy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest

from parscale_adapt.analysis.fit import _Problem, check_identifiable, fit_law
from parscale_adapt.analysis.runs import Run, published_runs
from parscale_adapt.analysis.scaling_law import DiversityLaw, LogLaw, law_from_dict, loss_contours


LOG_LAW = LogLaw(A=1.13e7, alpha=0.19, E=0.69, k=0.39)
DIVERSITY_LAW = DiversityLaw(A=1.13e7, alpha=0.19, E=0.69, rho=0.9)
SIZES = (0.5e9, 0.7e9, 1.1e9, 1.6e9, 2.8e9, 4.4e9)


def synthetic_runs(law, noise=0.0, seed=0):
    generator = np.random.default_rng(seed)
    return [
        Run(size, streams, float(law.loss(size, streams) * np.exp(noise * generator.standard_normal())))
        for size in SIZES
        for streams in (1, 2, 4, 8)
    ]


def test_losses_follow_the_equations_of_the_paper():
    size, streams = 1.6e9, 8
    equation_5 = (1.13e7 / (size * (0.39 * np.log(8) + 1))) ** 0.19 + 0.69
    assert LOG_LAW.loss(size, streams) == pytest.approx(equation_5, rel=1e-12)
    diversity = ((streams - 1) * 0.9 + 1) ** (-1 / 0.19)
    proposition_1 = (1.13e7 / (size * streams ** (1 / 0.19) * diversity)) ** 0.19 + 0.69
    assert DIVERSITY_LAW.loss(size, streams) == pytest.approx(proposition_1, rel=1e-9)


@pytest.mark.parametrize(
    ("dataset", "r2", "k", "others"),
    [
        # R2 and parameters as printed in figure 2 of the paper.
        ("stack-v2-python", 0.9978, 0.3935, {"E": 0.6912, "A": 1.131e7, "alpha": 0.1894}),
        ("pile", 0.9987, 0.3345, {"E": 1.2888, "A": 1.974e8, "alpha": 0.1963}),
    ],
)
def test_the_published_points_give_the_published_law(dataset, r2, k, others):
    fit = fit_law(published_runs(dataset), num_bootstrap=0)
    assert fit.r2 == pytest.approx(r2, abs=0.0005)
    assert fit.law.k == pytest.approx(k, abs=0.001)
    for name, value in others.items():
        assert getattr(fit.law, name) == pytest.approx(value, rel=0.002)
    assert fit.undetermined == ()
    assert fit_law(published_runs(dataset), form="diversity", num_bootstrap=0).r2 < fit.r2 - 0.001


@pytest.mark.parametrize(("law", "gain"), [(LOG_LAW, "k"), (DIVERSITY_LAW, "rho")])
def test_a_known_law_is_recovered(law, gain):
    exact = fit_law(synthetic_runs(law), form=law.form, num_bootstrap=0).law
    assert getattr(exact, gain) == pytest.approx(getattr(law, gain), rel=1e-3)
    assert exact.alpha == pytest.approx(law.alpha, rel=1e-2)
    noisy = fit_law(synthetic_runs(law, noise=0.002, seed=3), form=law.form, num_bootstrap=120)
    for name in ("A", "alpha", "E", gain):
        low, high = noisy.intervals[name]
        assert low < getattr(law, name) < high
        assert low < getattr(noisy.law, name) < high


def test_intervals_widen_with_noise_and_repeat_with_the_seed():
    quiet, loud, again = (
        fit_law(synthetic_runs(LOG_LAW, noise), num_bootstrap=40, seed=5).intervals["k"]
        for noise in (0.0005, 0.004, 0.004)
    )
    assert loud == again
    assert loud[1] - loud[0] > 3 * (quiet[1] - quiet[0])


def test_one_outlier_moves_a_huber_fit_little():
    runs = synthetic_runs(LOG_LAW, noise=0.0005)
    broken = [*runs[:-1], Run(runs[-1].num_params, runs[-1].num_streams, runs[-1].loss * 1.2)]
    assert fit_law(broken, num_bootstrap=0).law.k == pytest.approx(0.39, abs=0.03)


@pytest.mark.parametrize("form", ["log", "diversity"])
def test_the_gradient_is_that_of_the_objective(form):
    runs = synthetic_runs(LOG_LAW, noise=0.01)
    problem = _Problem.of(runs, form)
    log_losses = np.log(problem.losses)
    theta = np.array([-0.5, -1.0, 0.3, 0.4])
    _, gradient = problem.objective(theta, log_losses)
    for index in range(4):
        step = np.zeros(4)
        step[index] = 1e-6
        above, below = (problem.objective(theta + sign * step, log_losses)[0] for sign in (1, -1))
        assert gradient[index] == pytest.approx((above - below) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("law", [LOG_LAW, DIVERSITY_LAW])
def test_streams_to_match_and_equivalent_parameters_are_inverse(law):
    target = float(law.equivalent_params(1.6e9, 6))
    assert law.loss(target, 1) == pytest.approx(float(law.loss(1.6e9, 6)))
    assert law.streams_to_match(1.6e9, target) == pytest.approx(6)
    assert law.streams_to_match(1.6e9, 1.6e9) == 1
    assert law.params_for_loss(float(law.loss(2.8e9, 1))) == pytest.approx(2.8e9)


def test_contours_hold_the_law_on_a_grid():
    sizes, streams, losses = loss_contours(LOG_LAW, [1e9, 2e9, 4e9], [1, 2])
    assert losses.shape == (2, 3)
    assert losses[1, 2] == LOG_LAW.loss(4e9, 2)
    assert (sizes[1, 2], streams[1, 2]) == (4e9, 2)


@pytest.mark.parametrize("law", [LOG_LAW, DIVERSITY_LAW])
def test_a_law_survives_its_dictionary(law):
    assert law_from_dict({**law.as_dict(), "r2": 0.99}) == law


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LOG_LAW.loss(0, 2), r"parameters must be positive, got 0"),
        (lambda: LOG_LAW.loss(1e9, 0), r"streams must be at least 1, got 0"),
        (lambda: LOG_LAW.params_for_loss(0.5), r"no size reaches a loss of 0.5.*0.6900"),
        (lambda: LOG_LAW.streams_to_match(2e9, 1e9), r"cannot match 1e\+09 parameters with a model of 2e\+09"),
        (lambda: LOG_LAW.streams_to_match(1e9, 1e12), r"more than a billion"),
        (lambda: LogLaw(1e7, 0.2, 1.0, 0.0).streams_to_match(1e9, 2e9), r"more than a billion"),
        (lambda: DIVERSITY_LAW.streams_to_match(1e9, 2e9), r"the gain stays below 1.74"),
        (lambda: LogLaw(1e7, 0.2, -1.0, 0.4), r"`E` of a scaling law must be a number of at least 0, got -1.0"),
        (lambda: LogLaw(1e7, 0.0, 1.0, 0.4), r"`alpha` and `A` of a scaling law must be positive"),
        (lambda: DiversityLaw(1e7, 0.2, 1.0, 1.5), r"`rho` is a correlation between 0 and 1, got 1.5"),
        (lambda: law_from_dict({"form": "cubic"}), r"must be one of log, diversity, got 'cubic'"),
        (lambda: law_from_dict({"form": "log", "A": 1, "alpha": 1, "E": 1}), r"needs a number `k`, got None"),
        (lambda: fit_law(synthetic_runs(LOG_LAW), form="cubic"), r"`form` must be one of log, diversity, got `cubic`"),
        (lambda: fit_law(synthetic_runs(LOG_LAW), num_bootstrap=-1), r"at least 0 .* got -1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (synthetic_runs(LOG_LAW)[:4], r"at least five runs, got 4"),
        # One backbone: the adapter alone makes the counts differ.
        ([Run(5e8 + 2e6 * p, p, 1.2 - 0.01 * p) for p in (1, 2, 3, 4, 6, 8)], r"not identifiable from 1 model size:"),
        ([Run(n, p, 1.0) for n in (1e9, 1.01e9, 1.02e9) for p in (1, 2)], r"not identifiable from 1 model size:"),
        ([Run(n, p, 1.0) for n in (1e9, 2e9) for p in (1, 2, 4)], r"not identifiable from 2 model sizes"),
        ([Run(size, streams, 1.5) for size in SIZES for streams in (1, 2)], r"every run has the same loss, 1.5"),
        ([Run(n * 1e9, 2, 1.0 / n) for n in (1, 2, 3, 4, 5)], r"every run has 2 stream\(s\)"),
    ],
)
def test_runs_that_cannot_determine_the_law_are_refused(runs, message):
    with pytest.raises(ValueError, match=message):
        check_identifiable(runs)
    with pytest.raises(ValueError, match=message):
        fit_law(runs)


def test_a_parameter_on_the_edge_of_its_range_is_reported():
    """Streams that only harm leave k at 0: the fit says that it is not determined."""
    harmed = [
        Run(run.num_params, run.num_streams, float(LOG_LAW.loss(run.num_params, 1)) + 0.001 * run.num_streams)
        for run in synthetic_runs(LOG_LAW)
    ]
    fit = fit_law(harmed, num_bootstrap=0)
    assert fit.undetermined == ("k",)
    assert fit.law.k == 0


def test_bootstrap_fits_of_poor_runs_stay_finite():
    """Losses that hardly depend on the size run alpha and A to extremes."""
    runs = [Run(n, p, 1.0 + 0.01 * ((i * 7) % 5)) for i, (n, p) in enumerate((n, p) for n in SIZES for p in (1, 2))]
    fit = fit_law(runs, num_bootstrap=20)
    assert all(np.isfinite(interval).all() for interval in fit.intervals.values())
