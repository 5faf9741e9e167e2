"""Spectral reach of runs, and power laws over sizes, from data whose answer is known."""

import numpy as np
import pytest

import lnp
from lnp.runs.power_law import bootstrap

STEPS = [1, 10, 100, 1000, 10000]


def test_the_lowest_mean_of_a_window():
    r = lnp.reach(STEPS, [0.5, 0.1, 0.4, 0.2, 0.26], window=2)
    assert r.chi_pos == pytest.approx(0.23)  # not where the lowest one is
    assert r.stderr == pytest.approx(np.std([0.2, 0.26], ddof=1) / 2**0.5)
    assert r.step == pytest.approx(10**3.5)
    assert (r.window, r.runs) == (2, 1)
    assert lnp.reach(STEPS, [5, 4, 3, 2, 1], window=5).chi_pos == 3


def test_errors_of_the_measurements():
    positions, errors = [0.5, 0.2, 0.2, 0.2, 0.6], [0.1, 0.03, 0.03, 0.06, 0.1]
    r = lnp.reach(STEPS, positions, errors, window=3)
    assert r.chi_pos == pytest.approx(0.2)
    assert r.stderr == pytest.approx((0.03**2 + 0.03**2 + 0.06**2) ** 0.5 / 3)
    scattered = lnp.reach(STEPS, [0.5, 0.1, 0.3, 0.2, 0.6], errors, window=3)
    assert scattered.stderr == pytest.approx(0.1 / 3**0.5)  # more than the errors say
    assert lnp.reach(STEPS, positions, errors, window=1).stderr == 0.03
    assert np.isnan(lnp.reach(STEPS, positions, window=1).stderr)


def test_an_error_that_is_not_known_leaves_the_scatter():
    positions, errors = [0.5, 0.2, 0.1, 0.3, 0.6], [0.1, 0.03, np.nan, 0.06, 0.1]
    scatter = np.std([0.2, 0.1, 0.3], ddof=1) / 3**0.5
    assert lnp.reach(STEPS, positions, errors, window=3).stderr == pytest.approx(scatter)
    assert np.isnan(lnp.reach(STEPS, positions, errors, window=1).stderr)


def test_negative_and_missing_positions():
    r = lnp.reach(STEPS, [0.5, 0.1, -0.02, -0.01, np.nan], [0.01] * 5, window=2)
    assert r.chi_pos == pytest.approx(-0.015)
    assert np.isnan(lnp.reach(STEPS, [np.nan] * 5, window=2).chi_pos)
    assert lnp.reach([0, 2, 4], [3, 2, 1], window=3).step == 2  # step 0 has no logarithm


def test_the_window_takes_the_luck_out():
    """Of 200 noisy measurements of 1, fixed seed: the lowest single one is far off, the lowest window's mean is not."""
    noisy = 1 + 0.2 * np.random.default_rng(0).standard_normal(200)
    single, smooth = (lnp.reach(np.arange(200), noisy, np.full(200, 0.2), window=w) for w in (1, 50))
    assert single.chi_pos < 1 - 2 * single.stderr
    assert abs(smooth.chi_pos - 1) < 3 * smooth.stderr


def test_runs():
    runs = [lnp.reach(STEPS, np.array([0.5, 0.2, 0.1, 0.2, 0.3]) * f, window=2) for f in (1.0, 1.2, 1.4)]
    mean = lnp.reach_of_runs(runs)
    values = [run.chi_pos for run in runs]
    assert mean.chi_pos == pytest.approx(np.mean(values))
    own = sum(run.stderr**2 for run in runs) ** 0.5 / 3
    assert mean.stderr == pytest.approx(max(own, np.std(values, ddof=1) / 3**0.5))
    assert (mean.runs, mean.step) == (3, pytest.approx(runs[0].step))
    assert lnp.reach_of_runs(runs[:1]).stderr == runs[0].stderr
    close = [lnp.Reach(0.1 * f, 0.03, 10.0, 2) for f in (1.0, 1.001, 1.002)]
    assert lnp.reach_of_runs(close).stderr == pytest.approx(0.03 / 3**0.5)
    apart = [lnp.Reach(f, 0.03, 10.0, 2) for f in (1.0, 2.0)]
    assert lnp.reach_of_runs(apart).stderr == pytest.approx(0.5)
    unknown = [lnp.Reach(0.1 * f, np.nan, 10.0, 1) for f in (1.0, 1.1)]
    assert lnp.reach_of_runs(unknown).stderr == pytest.approx(0.005)


def test_bad_runs():
    with pytest.raises(ValueError, match="one position for each step"):
        lnp.reach(STEPS, [1, 2])
    with pytest.raises(ValueError, match="do not rise"):
        lnp.reach([1, 3, 2], [1, 2, 3], window=1)
    with pytest.raises(ValueError, match="window is 6 for 5"):
        lnp.reach(STEPS, [1] * 5, window=6)
    with pytest.raises(ValueError, match=r"window is 2\.5"):
        lnp.reach(STEPS, [1] * 5, window=2.5)
    with pytest.raises(ValueError, match="0 runs"):
        lnp.reach_of_runs([])
    with pytest.raises(ValueError, match=r"windows \[1, 2\]"):
        lnp.reach_of_runs([lnp.reach(STEPS, [1] * 5, window=w) for w in (1, 2)])


SIZES = np.geomspace(1e2, 1e5, 7)


def test_a_power_law_is_found():
    law = lnp.power_law(SIZES, 3.0 * SIZES**-0.4)
    assert (law.exponent, law.prefactor) == pytest.approx((-0.4, 3.0), rel=1e-10)
    assert law.exponent_stderr < 1e-10
    assert np.isnan(law.chi_square)
    value, error = law.predict(1e6)
    assert value == pytest.approx(3e6**-0.4 * 3**1.4, rel=1e-9)
    assert error < 1e-9
    assert "size^(-0.4 " in str(law)


def test_errors_are_those_of_the_line():
    """Weighted: (X^T W X)^-1 where the points scatter less than their errors, and Birge's factor where more."""
    rng = np.random.default_rng(0)
    relative = np.geomspace(0.02, 0.2, 7)
    noise = rng.standard_normal(7)
    x, w = np.stack([np.ones(7), np.log(SIZES)], axis=1), np.diag(relative**-2)
    covariance = np.linalg.inv(x.T @ w @ x)
    for factor in (0.2, 4.0):
        values = SIZES**-0.5 * np.exp(factor * relative * noise)
        law = lnp.power_law(SIZES, values, relative * values)
        beta = covariance @ x.T @ w @ np.log(values)
        chi = np.sum(((np.log(values) - x @ beta) / relative) ** 2)
        assert (np.log(law.prefactor), law.exponent) == pytest.approx(tuple(beta), rel=1e-9)
        assert law.chi_square == pytest.approx(chi, rel=1e-9)
        expected = covariance * max(1.0, chi / 5)
        assert law.covariance == pytest.approx(expected, rel=1e-9)
        assert law.exponent_stderr == pytest.approx(expected[1, 1] ** 0.5, rel=1e-9)
        assert law.prefactor_stderr == pytest.approx(law.prefactor * expected[0, 0] ** 0.5, rel=1e-9)
        row = np.array([1, np.log(500.0)])
        assert law.predict(500.0)[1] == pytest.approx(law.predict(500.0)[0] * (row @ expected @ row) ** 0.5, rel=1e-9)
    assert chi / 5 > 1  # the second one did


def test_errors_without_errors_are_least_squares():
    rng = np.random.default_rng(1)
    values = SIZES**-0.5 * np.exp(0.1 * rng.standard_normal(7))
    law = lnp.power_law(SIZES, values)
    coefficients, covariance = np.polyfit(np.log(SIZES), np.log(values), 1, cov=True)
    assert law.exponent == pytest.approx(coefficients[0], rel=1e-9)
    assert law.exponent_stderr == pytest.approx(covariance[0, 0] ** 0.5, rel=1e-9)


def test_coverage():
    """The exponent lies within one standard error in about 68% of 300 draws with known errors, fixed seed."""
    rng, relative = np.random.default_rng(2), np.full(7, 0.1)
    hits = []
    for _ in range(300):
        values = SIZES**-0.5 * np.exp(relative * rng.standard_normal(7))
        law = lnp.power_law(SIZES, values, relative * values)
        hits.append(abs(law.exponent + 0.5) < law.exponent_stderr)
    assert 0.6 < np.mean(hits) < 0.85  # errors only ever grow by the scatter, so that they cover a little more


def test_two_points():
    law = lnp.power_law([1, 10], [1, 0.1])
    assert law.exponent == pytest.approx(-1)
    assert np.isnan(law.exponent_stderr)
    law = lnp.power_law([1, 10], [1, 0.1], [0.1, 0.01])
    assert law.exponent_stderr == pytest.approx(0.1 * 2**0.5 / np.log(10), rel=1e-9)
    assert law.degrees == 0


def test_bad_points():
    with pytest.raises(ValueError, match="one value for each size"):
        lnp.power_law([1, 2], [1])
    with pytest.raises(ValueError, match="not positive"):
        lnp.power_law([1, 2], [1, -1])
    with pytest.raises(ValueError, match="not positive"):
        lnp.power_law([1, 2], [1, 1], [0.1, 0])
    with pytest.raises(ValueError, match="and finite"):
        lnp.power_law([1, 2], [1, np.inf])
    with pytest.raises(ValueError, match="size is 0"):
        lnp.power_law([1, 2], [1, 1]).predict(0)
    with pytest.raises(ValueError, match="two different"):
        lnp.power_law([2, 2], [1, 1])


def test_bootstrap():
    """Of runs that scatter by 10%, the interval holds the exponent and is as wide as the line's own error."""
    rng = np.random.default_rng(3)
    runs = [size**-0.5 * np.exp(0.1 * rng.standard_normal(8)) for size in SIZES]
    low, high = bootstrap(SIZES, runs, draws=300)
    assert low < -0.5 < high
    means, errors = [np.mean(r) for r in runs], [np.std(r, ddof=1) / 8**0.5 for r in runs]
    assert (high - low) / 2 == pytest.approx(lnp.power_law(SIZES, means, errors).exponent_stderr, rel=0.4)
    assert bootstrap(SIZES, runs, draws=300) == (low, high)
    with pytest.raises(ValueError, match="level is 68"):
        bootstrap(SIZES, runs, level=68)
    with pytest.raises(ValueError, match="runs for each size"):
        bootstrap([1.0], runs)
