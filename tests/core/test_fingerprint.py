"""What objects hold, as a value: every change shows, in small arrays and in large ones."""

import numpy as np
import pytest

from lnp.state.fingerprint import LARGE, fingerprint


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


def test_a_small_array_is_told_by_its_values_alone():
    square = np.arange(16.0).reshape(4, 4)
    assert fingerprint([[np.asfortranarray(square)]]) == fingerprint([[square]])
    assert fingerprint([[square.T]]) != fingerprint([[square]])


def test_the_order_in_memory_is_no_excuse():
    square = np.random.default_rng(0).standard_normal((1024, 1024))
    turned = np.asfortranarray(square)
    assert fingerprint([[turned.T.copy().T]]) == fingerprint([[turned]])
    assert fingerprint([[turned.T]]) != fingerprint([[turned]])  # the same memory, read in another order
