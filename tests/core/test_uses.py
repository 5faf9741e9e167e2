"""Uses of a parameter, joined and squared, against the gradients themselves; in two namespaces."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest

from lnp.per_sample.norms import Window
from lnp.per_sample.uses import Factors, addable, by_frame, gradients, inner_products, readable, square_norms

N, ROWS, COLUMNS = 4, 5, 3
DRAW = np.random.default_rng(0)


def outer(places):
    return Factors("outer", (DRAW.normal(size=(N, places, ROWS)), DRAW.normal(size=(N, places, COLUMNS))))


def rows(places):
    return Factors("rows", (DRAW.integers(-1, ROWS, (N, places)), DRAW.normal(size=(N, places, COLUMNS))))


def dense():
    return Factors("dense", (DRAW.normal(size=(N, ROWS, COLUMNS)),))


def gradient(use):
    """(N, rows, columns), as its form says."""
    if use.kind == "outer":
        return np.einsum("nsp,nsq->npq", *use.arrays)
    if use.kind == "dense":
        return use.arrays[0]
    index, values = use.arrays
    found = np.zeros((N, ROWS, COLUMNS))
    for n in range(N):
        for s in range(index.shape[1]):
            if index[n, s] >= 0:
                found[n, index[n, s]] += values[n, s]
    return found


USES = {
    "outer": [outer(1)],
    "outer at places": [outer(6)],
    "outer twice": [outer(2), outer(3)],
    "outer three times": [outer(1), outer(2), outer(1)],
    "rows": [rows(4)],
    "rows twice": [rows(1), rows(2)],
    "tied": [rows(4), outer(2), rows(1), outer(1)],
    "dense": [dense()],
    "dense twice": [dense(), dense()],
}


@pytest.mark.parametrize("xp", [np, array_api_strict])
@pytest.mark.parametrize("case", USES)
def test_against_the_gradients(case, xp):
    uses, u = USES[case], DRAW.normal(size=(ROWS, COLUMNS))
    given = [Factors(use.kind, tuple(map(xp.asarray, use.arrays))) for use in uses]
    whole = sum(gradient(use) for use in uses)
    assert np.asarray(square_norms(xp, given)) == pytest.approx((whole**2).sum((1, 2)), rel=1e-13)
    formed = sum(np.asarray(gradients(xp, use, (ROWS, COLUMNS))) for use in given)
    assert formed == pytest.approx(whole, rel=1e-12, abs=1e-12)
    products = sum(np.asarray(inner_products(xp, use, xp.asarray(u))) for use in given)
    assert products == pytest.approx((whole * u).sum((1, 2)), rel=1e-12, abs=1e-12)


def test_dense_uses_of_one_parameter_in_two_shapes():
    one, other = dense(), dense()
    flat = Factors("dense", (other.arrays[0].reshape(N, -1),))
    assert square_norms(np, [one, flat]) == pytest.approx(square_norms(np, [one, other]), rel=1e-14)


def test_a_transposed_weight_has_the_same_norm():
    use = outer(3)
    assert square_norms(np, [use.transposed()]) == pytest.approx(square_norms(np, [use]), rel=1e-13)
    whole, turned = gradients(np, use, (ROWS, COLUMNS)), gradients(np, use.transposed(), (COLUMNS, ROWS))
    assert turned == pytest.approx(whole.swapaxes(1, 2), rel=1e-13)
    looked_up = rows(2)
    assert looked_up.transposed() is looked_up


def test_gradients_of_a_convolution_that_sees_the_parameter_in_another_shape():
    x, d, window = DRAW.normal(size=(N, 2, 6)), DRAW.normal(size=(N, 3, 4)), Window((3,), (1,), (1,))
    found = gradients(np, Factors("convolution", (x, d, window)), (3, 6))
    expected = np.stack([np.einsum("nos,ncs->noc", d, x[:, :, o : o + 4]) for o in range(3)], axis=-1)
    assert found == pytest.approx(expected.reshape(N, 3, 6), rel=1e-12)


def test_a_backends_own_convolution_is_taken():
    use = Factors("convolution", ("x", "d", "window"))
    assert square_norms(np, [use], convolution=lambda *arrays: arrays) == ("x", "d", "window")


def test_what_can_be_read():
    apart, overlapping = (lambda frames: True), (lambda frames: False)
    assert readable(["a", "a"], ["outer", "rows"], overlapping)
    assert readable(["a", "b"], ["outer", "convolution"], apart)
    assert not readable(["a", "b"], ["outer", "outer"], overlapping)
    assert not readable(["a", "a"], ["outer", "dense"], apart)
    assert not readable(["b", "a", "a"], ["outer", "outer", "dense"], apart)
    assert not addable(["dense", "rows"])
    assert addable(["outer", "outer"])
    assert addable(["rows", "rows"])
    assert by_frame("aba") == {"a": [0, 2], "b": [1]}


def test_some_samples_of_a_use():
    """What is no array, such as how a kernel slides, is that of all."""
    x, d, window = DRAW.normal(size=(4, 2, 5)), DRAW.normal(size=(4, 3, 4)), Window((2,), (1,), (1,))
    some = Factors("convolution", (x, d, window)).of(np.asarray([2, 0]))
    assert np.array_equal(some.arrays[0], x[[2, 0]])
    assert np.array_equal(some.arrays[1], d[[2, 0]])
    assert some.arrays[2] is window
