"""Power laws over sizes, from data whose answer is known."""

import importlib.util
import itertools
import math
import sys

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
    assert law.predict(0.5)[0] == pytest.approx(3 * 0.5**-0.4, rel=1e-9)
    assert error < 1e-9
    assert "size^(-0.4 " in str(law)
    assert law.offset_stderr == 0
    assert lnp.power_law([1.0, 1.1, 1.2], [1.0, 0.9, 0.8]).r_squared > 0.9  # of logarithms whose variance is below one


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
    with pytest.raises(ValueError, match="at least 2 different"):
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
    for level in (68, 1.5, 1.0, 0.0):
        with pytest.raises(ValueError, match=f"level is {level}"):
            bootstrap(SIZES, runs, level=level)
    with pytest.raises(ValueError, match="runs for each size"):
        bootstrap([1.0], runs)


def test_a_level_is_the_share_of_refits_inside():
    """Of two sizes, one of which is known, the exponent is that of the other's mean, which takes few values."""
    ends = [bootstrap([1.0, 10.0], [[1.0], [0.1, 0.2, 0.3]], draws=200, level=level) for level in (0.5, 0.9)]
    drawn = [np.mean(some) for some in itertools.product([0.1, 0.2, 0.3], repeat=3)]
    for level, (low, high) in zip((0.5, 0.9), ends, strict=True):
        expected = np.log10(np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2]))
        assert (low, high) == pytest.approx(tuple(expected), abs=0.01)


scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="SciPy is not installed.")


def test_what_says_how_good_a_fit_is():
    rng = np.random.default_rng(4)
    values = SIZES**-0.5 * np.exp(0.1 * rng.standard_normal(7))
    law = lnp.power_law(SIZES, values, 0.05 * values)
    left = np.log(values) - np.polyval(np.polyfit(np.log(SIZES), np.log(values), 1), np.log(SIZES))
    assert law.r_squared == pytest.approx(1 - np.var(left) / np.var(np.log(values)), rel=1e-9)
    assert law.chi_square_per_degree == pytest.approx(np.sum((left / 0.05) ** 2) / 5, rel=1e-9)
    assert np.isnan(lnp.power_law([1, 10], [1, 1], [0.1, 0.1]).r_squared)
    relative = np.geomspace(0.02, 0.2, 7)  # a straight line's own, where points weigh by their errors
    fit = np.polyval(np.polyfit(np.log(SIZES), np.log(values), 1, w=1 / relative), np.log(SIZES))
    mean = np.average(np.log(values), weights=relative**-2)
    left, all_ = (np.sum(((np.log(values) - of) / relative) ** 2) for of in (fit, mean))
    assert lnp.power_law(SIZES, values, relative * values).r_squared == pytest.approx(1 - left / all_, rel=1e-9)
    assert np.isnan(lnp.power_law([1, 10], [1, 0.1], [0.1, 0.1]).chi_square_per_degree)


def test_reaches_are_taken_as_they_are():
    values = 3.0 * SIZES**-0.4
    reaches = [lnp.Reach(v, 0.1 * v, 10.0, 5) for v in values]
    law, plain = lnp.power_law(SIZES, reaches), lnp.power_law(SIZES, values, 0.1 * values)
    assert (law.exponent, law.exponent_stderr) == (plain.exponent, plain.exponent_stderr)
    unknown = lnp.power_law(SIZES, [lnp.Reach(v, np.nan, 10.0, 5) for v in values])
    assert np.isnan(unknown.chi_square)
    exact = lnp.power_law(SIZES, [lnp.Reach(v, 0.0, 10.0, 5) for v in values])
    assert exact.exponent == pytest.approx(-0.4)
    assert np.isnan(exact.chi_square)
    for mixed, options in (
        ([*reaches[:-1], 0.1], {}),
        (reaches, {"stderrs": 0.1 * values}),
        (reaches, {"limits": [False] * 7}),
    ):
        with pytest.raises(ValueError, match="Reach objects beside numbers, stderrs= or limits="):
            lnp.power_law(SIZES, mixed, **options)
    with pytest.raises(ValueError, match="not positive and finite"):  # errors of some alone are not left out in silence
        lnp.power_law(SIZES, [lnp.Reach(v, 0.1 * v if v < 0.3 else np.nan, 10.0, 5) for v in values])


@scipy
def test_an_offset_is_found():
    values = 1.7 + 30 * SIZES**-0.4
    law = lnp.power_law(SIZES, values, offset=True)
    assert (law.exponent, law.prefactor, law.offset) == pytest.approx((-0.4, 30.0, 1.7), rel=1e-5)
    assert law.r_squared == pytest.approx(1)
    assert law.predict(1e7)[0] == pytest.approx(1.7 + 30 * 1e7**-0.4, rel=1e-6)
    assert str(law).startswith("(1.7")
    without = lnp.power_law(SIZES, values, 0.01 * values)
    assert without.chi_square_per_degree > 3  # the line does not describe them, and says so
    none = lnp.power_law(SIZES, 3 * SIZES**-0.4, 0.03 * SIZES**-0.4, offset=True)
    assert none.exponent == pytest.approx(-0.4, rel=1e-3)
    assert abs(none.offset) < 2 * none.offset_stderr + 1e-6


@scipy
@pytest.mark.parametrize("values", [(1.69, 1.65, 1.64, 1.62, 1.69, 1.65, 1.65), (4.7, 4.64, 4.67, 4.63, 4.66, 4.69)])
def test_of_noise_the_best_law_is_a_constant_beside_the_first_value_and_has_no_exponent(values):
    """A search from one offset ends at a power that is nearly flat, which fits worse; what is no more than one point's
    has an error that says so."""
    values = np.array(values)
    law = lnp.power_law(np.geomspace(1e2, 1e6, len(values)), values, 0.02 * values, offset=True)
    logs = np.log(values[1:])
    assert law.chi_square == pytest.approx(np.sum((logs - logs.mean()) ** 2) / 0.02**2, rel=1e-5)
    assert law.offset == pytest.approx(np.exp(logs.mean()), rel=1e-5)
    assert law.offset_stderr == pytest.approx(0.02 * law.offset / len(logs) ** 0.5, rel=0.15)
    assert law.exponent_stderr > 10 * abs(law.exponent)


@scipy
@pytest.mark.parametrize("exponent", [-0.5, -0.95, -1.5])
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("share", [0.0, 0.7])
def test_laws_over_many_decades_are_found_in_any_unit(exponent, unit, share):
    """Four digits of each value, of which an offset is a share of the lowest."""
    sizes = np.geomspace(1e2, 1e8, 7)
    law = unit * (sizes / 1e2) ** exponent
    values = np.array([float(f"{value:.4g}") for value in law + share * law[-1]])
    found = lnp.power_law(sizes, values, 1e-3 * values, offset=True)
    assert found.chi_square < 1
    assert abs(found.exponent - exponent) < 2 * found.exponent_stderr < 1e-2
    assert abs(found.offset - share * law[-1]) < 2 * found.offset_stderr < 0.2 * law[-1]


@scipy
def test_coverage_with_an_offset():
    """Exponent and offset lie within one standard error in 58% to 80% of draws, within two in 88% or more."""
    rng, hits = np.random.default_rng(6), []
    true = 1.7 + 30 * SIZES**-0.4
    for _ in range(100):
        values = true * (1 + 0.01 * rng.standard_normal(7))
        law = lnp.power_law(SIZES, values, 0.01 * true, offset=True)
        z = (law.exponent + 0.4) / law.exponent_stderr, (law.offset - 1.7) / law.offset_stderr
        hits.append(np.abs([*z, *z]) < [1, 1, 2, 2])
    within = np.mean(hits, axis=0)
    assert np.all((within[:2] > 0.58) & (within[:2] < 0.85)), within
    assert np.all(within[2:] > 0.88), within


@scipy
def test_limits_keep_a_law_from_levelling_off():
    """Reaches of which the largest sizes are not resolved: as limits they leave the exponent unbiased, within its error
    in 55% to 85% of draws. Left out, what is left is what came out high, and the exponent is flat."""
    rng, sizes = np.random.default_rng(7), np.geomspace(1e2, 1e5, 13)
    true, error = sizes**-0.5, 0.01
    found, left_out = [], []
    for _ in range(100):
        reaches = [lnp.Reach(float(v), error, 1.0, 5) for v in true + error * rng.standard_normal(13)]
        law = lnp.power_law(sizes, reaches)
        found.append([law.exponent + 0.5, abs(law.exponent + 0.5) / law.exponent_stderr])
        kept = [(s, r.chi_pos) for s, r in zip(sizes, reaches, strict=True) if r.resolved]
        values = lnp.power_law(*zip(*kept, strict=True), [error] * len(kept))
        left_out.append(values.exponent + 0.5)
    bias, spread, within = np.mean(found, axis=0)[0], np.std(found, axis=0)[0], np.mean(np.array(found)[:, 1] < 1)
    assert abs(bias) < 0.5 * spread
    assert np.mean(left_out) > 2 * abs(bias)
    assert 0.55 < within < 0.85


@scipy
def test_limits_far_above_the_law_say_nothing():
    values = 3.0 * SIZES**-0.4
    law = lnp.power_law([*SIZES, 1e6], [*values, 9.0], [*(0.1 * values), 1.0], limits=[False] * 7 + [True])
    assert law.exponent == pytest.approx(-0.4, rel=1e-4)
    assert law.degrees == 5
    below = lnp.power_law([*SIZES, 1e6], [*values, 1e-3], [*(0.1 * values), 5e-4], limits=[False] * 7 + [True])
    assert below.exponent < -0.405


@scipy
def test_a_fit_with_limits_is_the_most_likely_one():
    """Of normal errors of log values, and the probability of each limit: by another search."""
    from scipy.optimize import minimize

    values = np.array([0.1, 0.03, 0.012, 0.004, 0.003, 0.002, 0.0021])
    errors, limit = 0.1 * values + 5e-4, np.arange(7) > 3

    def unlikely(solution):
        law = np.exp(solution[0] + solution[1] * np.log(SIZES))
        off = (np.log(values / law) * values / errors)[~limit]
        z = ((values - law) / errors - 2)[limit]
        return np.sum(off**2) / 2 - sum(math.log(math.erfc(-one / 2**0.5) / 2) for one in z)

    found = minimize(unlikely, [1.0, -0.6], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).x
    law = lnp.power_law(SIZES, values, errors, limits=limit)
    assert (np.log(law.prefactor), law.exponent) == pytest.approx(tuple(found), rel=1e-5)


def test_bad_limits(monkeypatch):
    with pytest.raises(ValueError, match="limits without errors"):
        lnp.power_law([1, 2, 3], [3, 2, 1], limits=[False, False, True])
    with pytest.raises(ValueError, match="at least 2 different ones, besides upper limits"):
        lnp.power_law([1, 2], [3, 2], [1, 1], limits=[False, True])
    with pytest.raises(ValueError, match="at least 3 different ones"):
        lnp.power_law([1, 2, 2], [3, 2, 2], offset=True)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"A power law with an offset or limits needs .*lnp\[spectrum\]"):
        lnp.power_law([1, 2, 3], [3, 2, 1], offset=True)


def test_the_error_of_a_prediction_by_hand():
    covariance = np.diag([0.01, 0.04, 0.09])
    law = lnp.PowerLaw(-1.0, 6.0, 0.2, 0.6, covariance, 1.0, 2, offset=0.5, offset_stderr=0.3)
    value, error = law.predict(3.0)
    assert value == pytest.approx(2.5)
    assert error**2 == pytest.approx(0.01 * 2**2 + 0.04 * (2 * np.log(3)) ** 2 + 0.09)
    straight = lnp.PowerLaw(-1.0, 6.0, 0.2, 0.6, covariance[:2, :2], 1.0, 2)
    assert straight.predict(3.0) == pytest.approx((2.0, np.sqrt(0.04 + 0.04 * (2 * np.log(3)) ** 2)))
    assert (straight.offset, straight.offset_stderr) == (0, 0)
