"""Squared norms from factors, beside the gradients that the factors stand for."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from lnp.per_sample import norms
from lnp.per_sample.norms import Window

BUDGETS = [1, 300, norms.BUDGET]
"""One sample at a time, some, and all."""


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def square(gradients):
    return (gradients**2).reshape(len(gradients), -1).sum(1)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 9, 8), (7, 3, 2), (2, 1, 1)])
def test_outer(shape, budget):
    positions, p, q = shape
    left, right = normal(5, positions, p), normal(5, positions, q, seed=1)
    expected = square(np.einsum("nsp,nsq->npq", left, right))
    np.testing.assert_allclose(norms.outer(np, left, right, budget=budget), expected, rtol=1e-12)


@pytest.mark.parametrize("positions", [3, 33])
@pytest.mark.parametrize("advantage", [1e-9, 1e9])
def test_both_forms(advantage, positions):
    left, right = normal(5, positions, 4), normal(5, positions, 2, seed=1)
    expected = square(np.einsum("nsp,nsq->npq", left, right))
    np.testing.assert_allclose(norms.outer(np, left, right, advantage), expected, rtol=1e-12)


@pytest.mark.parametrize(("positions", "products"), [(31, [(31, 31)] * 2), (32, [(16, 32)] * 2 + [(16, 16)] * 2)])
def test_a_quarter_of_a_large_gram_matrix_is_left_out(positions, products, monkeypatch):
    """It is symmetric, and products of fewer than 16 rows are slow."""
    made, plain = [], norms._products
    monkeypatch.setattr(norms, "_products", lambda xp, a, b: made.append((a.shape[1], b.shape[1])) or plain(xp, a, b))
    norms.outer(np, normal(5, positions, 4), normal(5, positions, 2, seed=1), 1e-9)
    assert made == products


def table(index, values, rows):
    gradients = np.zeros((len(index), rows, values.shape[2]))
    for n, s in itertools.product(range(index.shape[0]), range(index.shape[1])):
        if index[n, s] >= 0:
            gradients[n, index[n, s]] += values[n, s]
    return gradients


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("positions", [1, 6])
def test_rows(positions, budget):
    """Rows that are looked up twice add, those that are left out do not count."""
    index, values = np.random.default_rng(0).integers(-1, 3, (5, positions)), normal(5, positions, 4)
    expected = square(table(index, values, 3))
    np.testing.assert_allclose(norms.rows(np, index, values, budget=budget), expected, rtol=1e-12)


@pytest.mark.parametrize("budget", BUDGETS)
def test_rows_and_outer(budget):
    index, values = np.random.default_rng(0).integers(-1, 3, (5, 6)), normal(5, 6, 4)
    left, right = normal(5, 2, 3, seed=1), normal(5, 2, 4, seed=2)
    product = table(index, values, 3) * np.einsum("ntp,ntq->npq", left, right)
    found = norms.rows_and_outer(np, index, values, left, right, budget=budget)
    np.testing.assert_allclose(found, product.sum((1, 2)), rtol=1e-12)


CONVOLUTIONS = {
    "1-d": ((4, 9), (3,), (1,), (1,), 1, 5),
    "1-d, strided and dilated": ((4, 9), (3,), (2,), (2,), 1, 5),
    "2-d": ((3, 5, 6), (3, 2), (1, 1), (1, 1), 1, 4),
    "2-d, dilated": ((3, 5, 6), (2, 2), (1, 1), (2, 3), 1, 4),
    "2-d, strided, grouped": ((4, 5, 6), (2, 3), (2, 1), (1, 1), 2, 6),
    "2-d, few positions": ((12, 2, 2), (2, 1), (1, 1), (1, 1), 1, 12),
    "2-d, few positions, strided": ((12, 3, 3), (2, 2), (2, 2), (1, 1), 2, 12),
    "3-d, depthwise": ((2, 3, 4, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), 2, 4),
}


def kernel_gradients(x, d, window):
    """dL_n/dW of y[n, o, p] = sum_{c, k} W[o, c, k] x[n, c, stride p + dilation k], one number at a time."""
    channels, outputs = x.shape[1] // window.groups, d.shape[1] // window.groups
    gradients = np.zeros((len(x), d.shape[1], channels, *window.kernel))
    for o, c, *k in np.ndindex(d.shape[1], channels, *window.kernel):
        cut = [
            slice(dilation * i, dilation * i + stride * (size - 1) + 1, stride)
            for i, dilation, stride, size in zip(k, window.dilation, window.stride, d.shape[2:], strict=True)
        ]
        seen = x[(slice(None), o // outputs * channels + c, *cut)]
        gradients[(slice(None), o, c, *k)] = (seen * d[:, o]).reshape(len(x), -1).sum(1)
    return gradients


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("advantage", [1e-9, norms.GRAM_ADVANTAGE, 1e9])  # Gram form, whichever is cheaper, direct form
def test_convolution(name, budget, advantage, monkeypatch):
    monkeypatch.setattr(norms, "GRAM_ADVANTAGE", advantage)
    shape, kernel, stride, dilation, groups, outputs = CONVOLUTIONS[name]
    window = Window(kernel, stride, dilation, groups)
    places = [
        (size - step * (width - 1) - 1) // jump + 1
        for size, width, jump, step in zip(shape[1:], kernel, stride, dilation, strict=True)
    ]
    x, d = normal(5, *shape), normal(5, outputs, *places, seed=1)
    gradients = kernel_gradients(x, d, window)
    np.testing.assert_allclose(norms.convolution(np, x, d, window, budget, budget), square(gradients), rtol=1e-12)
    np.testing.assert_allclose(norms.convolution_gradients(np, x, d, window), gradients, rtol=1e-12, atol=1e-12)


@pytest.fixture
def asked(monkeypatch):
    """(numbers in memory for each sample, budget) of each sum over samples."""
    found, plain = [], norms.chunked

    def chunked(xp, form, arrays, size, limit):
        found.append((size, limit))
        return plain(xp, form, arrays, size, limit)

    monkeypatch.setattr(norms, "chunked", chunked)
    return found


@pytest.mark.parametrize(("channels", "outputs", "gram"), [(31, 29, True), (30, 29, False)])
def test_the_form_that_multiplies_less_is_taken(channels, outputs, gram, asked):
    """Of single points under the kernel at five of nine places: 9^2 C + 5^2 O products and 5^2 sums, which take as long
    as 20 products each, by 1.2; or 5 C O.
    """
    x, d = normal(3, channels, 9), normal(3, outputs, 5, seed=1)
    found = norms.convolution(np, x, d, Window((1,), (2,), (1,)), budget=1000, patches=10**6)
    np.testing.assert_allclose(found, square(np.einsum("nos,ncs->noc", d, x[:, :, ::2])), rtol=1e-12)
    assert gram == (1.2 * (81 * channels + 25 * outputs + 20 * 25) <= 5 * channels * outputs)
    # numbers in memory for each sample, and at a time: products of places; or patches
    assert asked == [(2 * 81 + 25, 1000) if gram else (5 * channels, 10**6)]


def test_numbers_in_memory_of_patches(asked):
    """2 x 3 offsets of a kernel, 2 of 4 channels in each of two groups, at 2 x 2 positions."""
    x, d = normal(3, 4, 3, 4), normal(3, 2, 2, 2, seed=1)
    norms.convolution(np, x, d, Window((2, 3), (1, 1), (1, 1), 2))
    assert asked == [(2 * 6 * 4, 2**19)]


@pytest.mark.parametrize(
    ("places", "left", "right", "advantage", "size"),
    [
        (3, 8, 4, 1.0, 32), (3, 9, 4, 1.0, 36), (3, 9, 5, 1.0, 2 * 9),  # S (p + q) products, or p q
        (2, 4, 4, 1.0, 2 * 4), (2, 4, 4, 2.0, 16), (2, 4, 3, 1.0, 12),
    ],
)  # fmt: skip
def test_the_form_of_outer_products_that_multiplies_less(asked, places, left, right, advantage, size):
    norms.outer(np, normal(5, places, left), normal(5, places, right), advantage, budget=1000)
    assert asked == [(size, 1000)]


def test_numbers_in_memory_of_rows(asked):
    index, values = np.zeros((5, 6), int), normal(5, 6, 4)
    norms.rows(np, index, values, budget=99)
    norms.rows_and_outer(np, index, values, normal(5, 2, 3), normal(5, 2, 4), budget=98)
    norms.rows(np, index[:, :1], values[:, :1], budget=97)  # of one place there is nothing to add
    assert asked == [(2 * 36, 99), (3 * 6 * 2, 98)]


@pytest.mark.parametrize(
    ("size", "budget", "pieces"),
    [(3, 7, [2, 2, 2, 2, 2]), (3, 30, [10]), (3, 29, [9, 1]), (3, 2, [1] * 10), (0, 4, [4, 4, 2]), (1, 9, [9, 1])],
)
def test_as_many_samples_at_a_time_as_the_budget_holds(size, budget, pieces):
    found, a = [], np.arange(10.0)
    form = lambda a, b: found.append(len(a)) or a * b
    assert np.array_equal(norms.chunked(np, form, (a, a), size, budget), a * a)
    assert found == pieces


def test_there_is_more_room_on_a_device():
    on = lambda kind: SimpleNamespace(device=SimpleNamespace(type=kind))
    assert norms.room(np.ones(3), 100) == norms.room(on("cpu"), 100) == 100
    assert norms.room(on("cuda"), 100) == norms.room(on("cuda"), 2**25) == 2**25
    assert norms.room(on("cuda"), 2**25 + 1) == 2**25 + 1


@pytest.mark.parametrize(("patches", "offsets"), [(10**6, [9]), (72, [9]), (71, [8, 1]), (30, [3, 3, 3]), (1, [1] * 9)])
def test_offsets_of_a_kernel_at_a_time(monkeypatch, patches, offsets):
    """As many as the patches of one sample leave room for: 2 channels at 4 positions."""
    monkeypatch.setattr(norms, "GRAM_ADVANTAGE", 1e9)
    found, plain = [], norms._patches
    monkeypatch.setattr(norms, "_patches", lambda xp, x, some: found.append(len(some)) or plain(xp, x, some))
    x, d, window = normal(1, 2, 4, 4), normal(1, 5, 2, 2, seed=1), Window((3, 3), (1, 1), (1, 1))
    gradients = kernel_gradients(x, d, window)
    np.testing.assert_allclose(norms.convolution(np, x, d, window, patches=patches), square(gradients), rtol=1e-12)
    assert found == offsets


def test_products_of_narrower_types_are_in_range():
    left, right = (np.full((1, 2, 1), 300, np.float16) for _ in range(2))
    assert norms.outer(np, left, right, advantage=1e9)[0] == (2 * 300.0**2) ** 2


def test_float32_for_narrower_types():
    left, right = (np.full((1, 1, 1), 300, np.float16) for _ in range(2))
    assert norms.outer(np, left, right)[0] == 300.0**4
