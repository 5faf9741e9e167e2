"""Weights of experts, against their gradients added up one row at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lnp.per_sample import experts, norms, uses
from lnp.per_sample.experts import Sent
from lnp.per_sample.norms import BUDGET
from lnp.per_sample.uses import Factors

SIZES = st.tuples(*(st.integers(1, most) for most in (4, 40, 5, 4, 6)))


def case(sizes, seed):
    """(the factors of rows of which some are left out, the gradients (N, E, p, q), something of their shape)."""
    samples, rows, p, q, experts = sizes
    draw = np.random.default_rng(seed)
    sample, expert = draw.integers(-1, samples, rows), draw.integers(-1, experts, rows)
    left, right, u = draw.normal(size=(rows, p)), draw.normal(size=(rows, q)), draw.normal(size=(experts, p, q))
    gradients = np.zeros((samples, experts, p, q))
    for row in range(rows):
        if min(sample[row], expert[row]) >= 0:
            gradients[sample[row], expert[row]] += np.outer(left[row], right[row])
    return Factors("experts", (Sent(np, sample, expert, samples, experts), left, right)), gradients, u


@given(SIZES, st.integers(0, 99), st.sampled_from([8, 64, BUDGET]))
def test_what_is_made_of_their_gradients(sizes, seed, budget):
    factors, expected, u = case(sizes, seed)
    every = np.arange(sizes[0])
    for some in (slice(None), slice(0, 1), every[::2], every[::-1]):
        of_some, gradients = factors.of(some), expected[some]
        assert uses.gradients(np, of_some, u.shape) == pytest.approx(gradients, abs=1e-12)
        squares = (gradients**2).sum((1, 2, 3))
        assert uses.square_norms(np, [of_some], budget=budget) == pytest.approx(squares, abs=1e-10)
        products = (gradients * u).sum((1, 2, 3))
        assert uses.inner_products(np, of_some, u) == pytest.approx(products, abs=1e-10)


def test_pieces_hold_what_the_budget_says(monkeypatch):
    """Rows of both factors, for as many pairs of a sample and an expert at a time."""
    seen, chunked = [], norms.chunked

    def watched(xp, function, arrays, size, budget):
        seen.append((len(arrays[0]), size, budget))
        return chunked(xp, function, arrays, size, budget)

    monkeypatch.setattr(experts.norms, "chunked", watched)
    sent = Sent(np, np.repeat(np.arange(5), 3), np.zeros(15, int), 5, 1)
    experts.square_norms(sent, np.ones((15, 2)), np.ones((15, 7)), 99)
    assert seen[0] == (5, 4 * (2 + 7), 99)


def test_few_rows_are_not_padded_to_the_most():
    """One sample sends a thousand rows to one expert, and one to the other."""
    sent = Sent(np, np.zeros(1001, int), np.asarray([0] * 1000 + [1]), 1, 2)
    assert sent.by_pair.by_size == {1024: [0], 1: [1]}
