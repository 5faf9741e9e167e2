"""Squared standard errors and their degrees of freedom, against their formulas by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lnp.estimators import errors


def nu(terms, f, counted=1):
    """Satterthwaite's number for a sum of squares of f degrees of freedom each, each counted so often."""
    return (f + 2) * sum(terms) ** 2 / (counted * sum(term * term for term in terms)) - 2


X = np.array([[1.0, 2.0, 3.0, 2.0], [0.0, 4.0, 0.0, 4.0]])


def test_across_groups():
    found = errors.across_groups(np, X)
    assert found.variance == pytest.approx([4 / 3 * 2, 4 / 3 * 16])
    limit = 3 / 4 * 18**2 / (1 + 16 + 81 + 16)  # noise in proportion to the values
    assert found.freedom == pytest.approx(min(nu([1, 0, 1, 0], 1), limit))
    assert np.isnan(errors.across_groups(np, X[:, :1]).variance).all()
    one_apart = errors.across_groups(np, np.array([[10.0] * 11 + [13.0]]))
    assert one_apart.freedom == pytest.approx(nu([1 / 16] * 11 + [2.75**2], 1))


def test_within_groups():
    squares = np.array([[1.0, 3.0], [2.0, 2.0]])
    found = errors.within_groups(np, squares, 5)
    assert found.variance == pytest.approx([4 / 20, 4 / 20])
    assert found.freedom == pytest.approx(nu([1, 3], 4))
    assert errors.within_groups(np, squares, np.asarray(5)).variance == pytest.approx([0.2, 0.2])
    assert errors.within_groups(np, np.zeros((1, 2)), 1).variance == [0]


def test_of_differences():
    values, some, others = np.array([[1.0, 2.0, 2.0]]), np.array([[1.0, 2.0]]), np.array([[3.0, 3.0]])
    found = errors.of_differences(np, values, some, others)
    assert found.variance == pytest.approx([(4 + 1) / 2 * 9 / 5])
    assert found.freedom == pytest.approx(min(nu([4, 1], 1), 81 / 33))
    alike = errors.of_differences(np, np.ones((1, 40)), np.ones((1, 40)), np.zeros((1, 40)))
    assert alike.freedom == pytest.approx(40)


@pytest.mark.parametrize(("probes", "factor"), [(1, 1.0), (2, 6 / 7), (np.asarray(2), 6 / 7)])
def test_of_swaps(probes, factor):
    squares, own = np.array([[2.0, 2.0, 6.0, 6.0]]), np.array([[3.0, 5.0, 8.0, 12.0]])
    given = {"pairs": 2, "samples": 12, "block": 8, "probes": probes, "shared": 0.5}
    found = errors.of_swaps(np, squares, own, **given)
    residual = 7 / 8 * 16 / 16  # (m - 1)/m, the mean over two pairs of (d + d')^2 / 4, which each stands there twice
    whole = 7 / 8 * 28 / 8
    assert found.variance == pytest.approx([12 / int(probes) * factor * residual + 0.5 * (whole - residual)])
    assert found.freedom == pytest.approx(min(nu([2, 2, 6, 6], 1, 2), nu([3, 5, 8, 12], 1)))
    more = errors.of_swaps(np, squares, own, **(given | {"pairs": 6}))
    assert more.freedom == pytest.approx(min(nu([2, 2, 6, 6], 3, 2), nu([3, 5, 8, 12], 3)))
    assert errors.of_swaps(np, own, np.zeros((1, 4)), **given).variance == pytest.approx(
        [12 / int(probes) * factor * 7 / 8 * 28 / 16]
    )


def test_scaling_by_other_samples_and_without_any():
    assert errors.scaled_up(np, np.array([[3.0, 4.0]]), np.array([[4.0]])) == pytest.approx([25 / 16])
    assert errors.scaled_up(np, np.zeros((1, 2)), np.zeros((1, 1))) == [0]


def test_without_noise_freedom_is_large():
    none = errors.freedom(np, np.zeros((1, 3)), 1)
    assert none == errors.LARGE
    bounded = errors.no_freer_than(np, errors.Error(np.ones(1), none), np.zeros((1, 3)), 1)
    assert bounded.freedom == errors.LARGE
    assert errors.no_freer_than(np, errors.Error(np.ones(1), none), np.ones((1, 3)), 2).freedom == pytest.approx(6)


def test_one_sample_has_the_freedom_of_one():
    none = errors.freedom(np, np.zeros((1, 3)), 1)
    assert errors.freedom(np, np.array([[0.0, 4.0, 0.0]]), 3) == pytest.approx(3)
    bounded = errors.no_freer_than(np, errors.Error(np.ones(1), none), np.array([[0.0, 4.0, 0.0]]), 0.75)
    assert bounded.freedom == pytest.approx(0.75)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_of_traces_stay_in_the_range_of_float32(scale):
    def single(*values):
        return (scale * np.array([values])).astype("float32")

    with np.errstate(all="raise"):
        assert errors.scaled_up(np, single(3.0, 4.0), single(4.0)) == pytest.approx([25 / 16])
        assert errors.freedom(np, single(0.0, 1.0, 3.0), 4) == pytest.approx(nu([1, 3], 4))
        error = errors.Error(np.ones(1), np.asarray(1e3))
        assert errors.no_freer_than(np, error, single(0.0, 1.0, 2.0), 1).freedom == pytest.approx(25 / 17)
    assert errors.scaled_up(np, single(1e-12, 4.0), single(4.0)) == pytest.approx([1.0])
