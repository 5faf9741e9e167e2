"""What objects hold, as a value: every change shows, in small arrays and in large ones."""

import random
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from lnp.state.fingerprint import LARGE, _weights, fingerprint, random_states


@pytest.mark.parametrize("size", [10, LARGE // 4, LARGE // 4 + 131_077])
def test_every_number_of_an_array_counts(size):
    array = np.random.default_rng(0).standard_normal(size).astype("float32")
    before = fingerprint([[array]])
    assert fingerprint([[array.copy()]]) == before
    for index in (0, size // 2, size - 1):
        other = array.copy()
        other[index] = np.nextafter(other[index], np.float32(9))
        assert fingerprint([[other]]) != before
    swapped = array.copy()
    swapped[[0, -1]] = swapped[[-1, 0]]
    assert fingerprint([[swapped]]) != before


def test_every_sign_of_a_large_array_counts():
    """A sign is the highest bit of a number, which a sum modulo 2^64 with an even weight would not see."""
    array = np.random.default_rng(0).standard_normal(LARGE // 8)
    before = fingerprint([[array]])
    for index in range(40):
        other = array.copy()
        other[index] *= -1
        assert fingerprint([[other]]) != before, index


def test_every_exchange_of_two_numbers_of_a_large_array_counts():
    array = np.random.default_rng(0).standard_normal(LARGE // 8)
    before = fingerprint([[array]])
    for index in range(40):
        other = array.copy()
        other[[index, index + 1]] = other[[index + 1, index]]
        assert fingerprint([[other]]) != before, index


def test_weights_are_odd_and_no_two_are_the_same():
    weights = _weights.__wrapped__()
    assert (weights % 2 == 1).all()
    assert len(np.unique(weights)) == len(weights)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_large_array_is_not_copied(order):
    array = np.zeros((1024, 1024), order=order)
    fingerprint([[array]])
    tracemalloc.start()
    fingerprint([[array]])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < array.nbytes / 8


@pytest.mark.parametrize(("one", "other"), [(0.0, -0.0), (1, 1.0), (1, True), (1.0, 1 + 0j), ("1", 1)])
def test_numbers_that_are_only_equal_are_told_apart(one, other):
    assert fingerprint([[one]]) != fingerprint([[other]])


def test_a_number_that_is_not_equal_to_itself_is_the_same():
    assert fingerprint([[float("nan")]]) == fingerprint([[float("nan")]])


def test_it_counts_which_of_two_like_objects_is_held():
    first, second = [1.0], [1.0]
    assert fingerprint([[first, second, [first]]]) != fingerprint([[first, second, [second]]])


def test_what_is_not_searched_has_the_key_that_is_given_for_it():
    found = [fingerprint([[Fraction(n)]], frozenset({"fractions"}), held) for n in (1, 2) for held in (str, type)]
    assert found[0] != found[2]
    assert found[1] == found[3]


def test_random_states_change_with_draws_and_with_nothing_else():
    held, generator = [1.0], np.random.default_rng(0)
    before = random_states([held, generator])
    held[0] = 2.0
    assert random_states([held, generator]) == before
    for draw in (generator.random, random.random, np.random.rand):
        draw()
        before, earlier = random_states([held, generator]), before
        assert before != earlier


def test_a_small_array_is_told_by_its_values_alone():
    square = np.arange(16.0).reshape(4, 4)
    assert fingerprint([[np.asfortranarray(square)]]) == fingerprint([[square]])
    assert fingerprint([[square.T]]) != fingerprint([[square]])


def test_the_order_in_memory_is_no_excuse():
    square = np.random.default_rng(0).standard_normal((1024, 1024))
    turned = np.asfortranarray(square)
    assert fingerprint([[turned.T.copy().T]]) == fingerprint([[turned]])
    assert fingerprint([[turned.T]]) != fingerprint([[turned]])  # the same memory, read in another order
