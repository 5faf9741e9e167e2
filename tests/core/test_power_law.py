"""Power laws over sizes, from data whose answer is known."""

import numpy as np
import pytest

import lnp
from lnp.runs.power_law import bootstrap

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
