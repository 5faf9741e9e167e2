"""Balanced signs: unbiased whatever is drawn, with the variance of the theory, and the same ones everywhere."""

import hashlib
import itertools

import array_api_strict
import numpy as np
import pytest

from core.dense import balanced
from lnp.estimators import signs as designs
from lnp.estimators.signs import Signs, layout, product, seed_words, sylvester

SHAPES = {(7, 16): False, (8, 16): True, (3, 4): False, (4, 4): True, (8, 1): False, (8, 2): True, (4, 9): False}
"""{(samples, outputs): whether signs are balanced}; a block is as long as the next power of two."""


def kernels(samples, outputs, common=0.7, seed=0):
    """(N, K, K) blocks of a kernel whose samples have a part in common."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(outputs, 2 * outputs))
    rows = common * shared + (1 - common) * rng.normal(size=(samples, outputs, 2 * outputs))
    return np.einsum("nkp,nlp->nkl", rows, rows)


def square_norms(kernel, v):
    return np.einsum("nkl,nk,nl->n", kernel, v, v)


def off_diagonal(kernel):
    return kernel * (1 - np.eye(kernel.shape[-1]))


def whole_block(bits, outputs, samples):
    """All vectors of a block: (draws, N, K), of every a, b and sign of an output."""
    m, x = 1 << bits, np.arange(samples, dtype="int32")
    for a, b in itertools.product(range(1, m), range(m)):
        rows = sylvester(bits)[product(np, np.full_like(x, a), x, bits) ^ b][:, :outputs]
        for eps in itertools.product((-1.0, 1.0), repeat=outputs):
            yield rows * np.asarray(eps)


@pytest.mark.parametrize(("bits", "outputs", "samples"), [(2, 3, 4), (2, 4, 4), (3, 5, 8), (2, 3, 3), (2, 3, 2)])
def test_unbiased_and_the_variance_by_enumeration(bits, outputs, samples):
    """2 m/(m - 1) sum of squared deviations from the mean for a whole block; of r samples, those of r places of it."""
    kernel, m = kernels(samples, outputs), 1 << bits
    totals = [square_norms(kernel, v).sum() for v in whole_block(bits, outputs, samples)]
    assert np.mean(totals) == pytest.approx(np.einsum("nkk->", kernel), rel=1e-12)
    off = off_diagonal(kernel)
    expected = 2 * (m / (m - 1) * np.sum(off**2) - np.sum(off.sum(axis=0) ** 2) / (m - 1))
    assert np.var(totals) == pytest.approx(expected, rel=1e-12)
    if samples == m:
        assert expected == pytest.approx(2 * m / (m - 1) * np.sum((off - off.mean(axis=0)) ** 2), rel=1e-12)


def test_each_sample_alone_is_unbiased():
    kernel = kernels(4, 3)
    values = np.mean([square_norms(kernel, v) for v in whole_block(2, 3, 4)], axis=0)
    assert values == pytest.approx(np.einsum("nkk->n", kernel), rel=1e-12)


@pytest.mark.parametrize("bits", range(1, 19))
def test_multiplication_is_that_of_a_field(bits):
    """x -> a x hits everything once, so that no two samples of a block have one place."""
    x = np.arange(1 << bits, dtype="int32")
    for a in {1, (1 << bits) - 1, 1 << bits - 1, 5 % (1 << bits) or 1}:
        assert len(np.unique(product(np, np.full_like(x, a), x, bits))) == 1 << bits


@pytest.mark.parametrize("degree", range(1, designs.WIDEST.bit_length()))
def test_the_fields_have_a_polynomial_that_is_no_product(degree):
    """Divided by every polynomial of at most half its degree, it leaves a remainder."""
    divisors = range(2, 1 << degree // 2 + 1)
    assert designs.IRREDUCIBLE[degree - 1] < 1 << degree
    assert all(remainder(designs.IRREDUCIBLE[degree - 1] | 1 << degree, divisor) for divisor in divisors)


def remainder(polynomial, divisor):
    """Long division of polynomials over {0, 1}, whose coefficients are bits."""
    while polynomial.bit_length() >= divisor.bit_length():
        polynomial ^= divisor << polynomial.bit_length() - divisor.bit_length()
    return polynomial


def test_positions_come_first_unless_it_is_said_that_channels_do():
    assert layout([(8, 32, 32, 3)]) == (3, False)


@pytest.mark.parametrize(("samples", "outputs"), [(4, 2), (16, 10), (32, 3), (64, 16), (8, 8)])
def test_whole_blocks_cancel(samples, outputs):
    """sum_n v_nk v_nl = 0 for k != l, also over probes that follow each other."""
    signs = balanced((samples, outputs))
    assert signs.balanced
    for index in range(5):
        v = signs(index)
        assert set(np.unique(v)) == {-1, 1}
        assert np.array_equal(v.T @ v, samples * np.eye(outputs))


@pytest.mark.parametrize(("samples", "outputs", "probes"), [(8, 10, 2), (10, 10, 8), (12, 12, 4), (14, 9, 8)])
def test_blocks_fill_up_from_probe_to_probe(samples, outputs, probes):
    signs = balanced((samples, outputs))
    assert signs.balanced
    total = sum(signs(index).T @ signs(index) for index in range(probes))
    assert np.array_equal(total, samples * probes * np.eye(outputs))


@pytest.mark.parametrize("samples", [4, 7, 8, 33])
def test_pairs_swap(samples):
    signs = balanced((samples, 4))
    for index in (0, 3):
        pair = signs.pairs(index)
        partner, everyone = pair.partner, np.arange(samples)
        assert np.array_equal(pair.first, signs(index))
        assert np.array_equal(partner[partner], everyone)
        alone = partner == everyone
        assert alone.sum() == samples % 2
        ratio = (pair.second * pair.first[partner])[~alone]
        assert np.all(ratio == ratio[:, :1])  # the partner's vector, up to its sign
        assert np.all(np.sum(pair.first * pair.second, axis=1)[~alone] != 4)
    size = samples // 2 * 2
    index, places = signs.drawn(size), signs.drawn_partners(size)
    assert np.array_equal(signs.pairs(0).partner[index], index[places])
    assert np.all(np.diff(index) > 0)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("positions", "width"), [(4, 6), (16, 9), (40, 8)])
def test_vectors_of_a_samples_positions_are_orthogonal(positions, width, last):
    signs = Signs(np, seed_words(3), (3, positions * width), width, last, np.float64)
    assert not signs.balanced
    m = 1 << (width - 1).bit_length()
    for v in signs(2).reshape(3, width, positions).swapaxes(1, 2) if last else signs(2).reshape(3, positions, width):
        for start in range(0, positions, m):
            block = v[start : start + m].T @ v[start : start + m]
            if len(v[start : start + m]) == m:
                assert np.array_equal(block, m * np.eye(width))


def test_blocks_of_a_samples_positions_are_drawn_on_their_own():
    """Of two numbers at each position, the sign of their product is one of two in a block, in either order."""
    signs = Signs(np, seed_words(0), (2, 16), 2, False, np.float64)
    drawn = np.stack([signs(index) for index in range(200)]).reshape(200, 2, 8, 2).prod(axis=-1)
    first = drawn[:, :, ::2]  # of the first position of each of four blocks
    np.testing.assert_array_equal(drawn[:, :, 1::2], -first)
    pairs = first.reshape(200, 8).T @ first.reshape(200, 8)
    assert np.abs(np.triu(pairs, k=1)).max() < 5 * 200**0.5


@pytest.mark.parametrize("shape", [((6, 20), 5), ((3, 7), 0), ((8, 8), 0), ((5, 1), 0), ((2, 9), 3)])
def test_no_two_outputs_are_correlated(shape):
    """Sums of 2,000 products of signs: none beyond 6 of their standard deviations."""
    (samples, outputs), width = shape
    signs = balanced((samples, outputs), width=width)
    drawn = np.stack([balanced((samples, outputs), seed, width=width)(seed % 3) for seed in range(2000)])
    flat = drawn.reshape(2000, -1)
    products = flat.T @ flat / 2000
    assert np.max(np.abs(products - np.eye(samples * outputs))) < 6 / 2000**0.5
    assert np.max(np.abs(flat.mean(axis=0))) < 6 / 2000**0.5
    assert np.array_equal(signs(1), balanced((samples, outputs), width=width)(1))


def test_blocks_run_over_samples_where_these_fill_at_least_half_of_one():
    balanced = {shape: Signs(np, seed_words(0), shape, 0, False, np.float64).balanced for shape in SHAPES}
    assert balanced == SHAPES


def test_a_shift_to_the_right_knows_no_sign():
    words = np.array([-1, -(2**31), 5], dtype=np.int32)
    assert designs._shifted(np, words, 0).tolist() == words.tolist()
    assert designs._shifted(np, words, 31).tolist() == [1, 1, 0]
    assert designs._shifted(np, words, 1).tolist() == [2**31 - 1, 2**30, 2]


def test_words_are_spread():
    """Bits of successive counters, seeds and probes are as many ones as zeros, and go with no other one."""
    words = [balanced((4, 4), seed)._keys(index) for seed in range(300) for index in range(5)]
    bits = (np.stack(words).view(np.uint32)[:, :, None] >> np.arange(32, dtype="uint32") & 1).reshape(1500, -1)
    changing = bits.std(axis=0) > 0
    signs = 2.0 * bits[:, changing] - 1
    assert np.max(np.abs(signs.mean(axis=0))) < 6 / 300**0.5
    assert len(np.unique(np.stack(words)[:, designs.SIGMA])) == 1500


@pytest.mark.parametrize(("shape", "width"), [((16, 10), 0), ((3, 20), 5), ((9, 8), 0)])
def test_a_seed_that_is_known_later_gives_the_same(shape, width):
    """Arrays of another namespace, as in compiled code."""
    xp = array_api_strict
    later = Signs(xp, xp.asarray(seed_words(7)), shape, width, False, xp.float64)
    known = balanced(shape, 7, width=width)
    for index in (0, 5):
        assert np.array_equal(np.asarray(later(xp.asarray(index, dtype=xp.int32))), known(index))
    if known.balanced:
        one, other = later.pairs(0), known.pairs(0)
        for name in ("first", "second", "partner"):
            assert np.array_equal(np.asarray(getattr(one, name)), getattr(other, name))


def test_long_rows_are_cut():
    signs = balanced((1, 2 * designs.WIDEST + 3))
    v = signs(0)
    assert v.shape == (1, 2 * designs.WIDEST + 3)
    assert abs(v.sum()) < 6 * v.size**0.5


@pytest.mark.parametrize(
    ("shape", "options", "digest"),
    [
        ((40, 3), {}, "9fdcc041ae938541"),
        ((9, 12), {"width": 4}, "a01b29233c978622"),
        ((9, 12), {"width": 4, "positions_last": True}, "4d6d14c4b6204ab1"),
        ((3, 24), {"width": 4}, "8698406b521376a6"),  # two blocks
        ((3, 700), {}, "141d927b6f5fbc66"),
        ((2, 1), {}, "982b5c88b0eb0ad2"),
        ((40, 3), {"seed": 2**33 + 5}, "6228dd2ffde67042"),
    ],
)
def test_a_seed_draws_the_same_signs_in_every_version(shape, options, digest):
    """Otherwise a run that goes on with another version would have a step in its columns."""
    given = {"seed": 0, "width": 0, "positions_last": False} | options
    drawn = Signs(np, seed_words(given["seed"]), shape, given["width"], given["positions_last"], np.float32)
    assert fingerprint(drawn(0), drawn(3)) == digest


def test_a_seed_draws_the_same_pairs_in_every_version():
    pairs = Signs(np, seed_words(0), (41, 3), 0, False, np.float32).pairs(1)
    assert fingerprint(pairs.first, pairs.second, pairs.partner) == "3a86a263f01030b0"


def fingerprint(*arrays):
    content = np.concatenate([array.ravel() for array in arrays]).astype(np.int8).tobytes()
    return hashlib.sha256(content).hexdigest()[:16]
