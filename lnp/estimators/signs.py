r"""Random signs for probes, balanced so that part of the noise cancels: the same ones in every framework.

The outputs of a sample are S rows of V numbers: one row, or one for each position (a token, a pixel). Let m be the
smallest power of two >= V, and H the Sylvester-Hadamard matrix, H[r, k] = (-1)^(number of ones in r AND k). The signs
are

    v[n, s, k] = sigma[n, s] eps[k] H[r[n, s], k]

with independent random signs sigma and eps, and places r in H that are each uniform on 0 ... m - 1. Therefore
E v_i v_j = 0 for i != j, and E ||J^T v||^2 = tr Theta, whatever the places of different rows have to do with each
other. In blocks of m rows they are all different:

    the positions of one sample     its vectors are orthogonal;
    m samples of one row each       sum_n v_nk v_nl = 0 for k != l: what the samples' kernels have in common cancels.

The second needs batches of at least m / 2. In a block r(x) = a x + b for x = 0 ... m - 1, in the field of m elements,
with a != 0 and b drawn for each block: any two x have places that are uniform among all different pairs. Nothing of
size m x m is formed, for H is a Kronecker product. Derivation and variances: docs/theory.md, "Balanced signs". Random
words are hashes of a counter, by the finaliser "lowbias32" of Chris Wellons,
https://nullprogram.com/blog/2018/07/31/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lnp.contract.linearization import Array, Namespace

WIDEST = 2**18
"""Longer rows are cut into several: tables of H's factors grow with the root of this."""
LEAST = 4
"""Samples of a balanced batch: two pairs."""
IRREDUCIBLE = (1, 3, 3, 3, 5, 3, 3, 27, 17, 9, 5, 9, 27, 33, 3, 43, 9, 9)
"""For q = 1, 2, ... the lower bits of a polynomial of degree q over {0, 1} that is no product of others: multiplication
modulo it is that of the field of 2^q elements."""
EPS, SIGMA, FACTOR, SHIFT, ORDER = STREAMS = range(5)
"""Streams of random words: what they are for."""
OF_PROBE = SIGMA, ORDER
"""Those that each probe draws anew. Blocks have words of their own, for they run on from probe to probe."""


@dataclass(frozen=True)
class PairedProbe:
    """Signs of samples that come in pairs, and swap their vectors.

    Attributes
    ----------
    first, second:
        (N, K) signs, and those with the vectors of each pair swapped. A sample without a partner has another vector.
    partner:
        (N,) indices: the other sample of the pair, or the sample itself where it has no partner.
    """

    first: Array
    second: Array
    partner: Array


@dataclass(frozen=True)
class Signs:
    """Random signs for the outputs of one batch, by the index of the probe.

    Attributes
    ----------
    xp:
        Namespace of the signs.
    seed:
        (W,) int32 words, NumPy's where they are known beforehand.
    shape:
        (N, K).
    width:
        V, the numbers of one position, or 0 where the outputs of a sample have no positions.
    positions_last:
        Whether the outputs of a sample are (V, S), as in images whose channels come first, and not (S, V).
    dtype:
        Of the signs.
    place:
        An array of the seed's framework -> one of the signs' on their device.
    """

    xp: Namespace
    seed: Array
    shape: tuple[int, int]
    width: int
    positions_last: bool
    dtype: Any
    place: Callable[[Array], Array] = lambda array: array

    def __call__(self, index: int | Array) -> Array:
        """(N, K) signs of a probe."""
        index = self._known(index)
        keys = self._keys(index)
        if self.balanced:
            return self._of_slots(keys, index, self._ints.argsort(self._order(keys)))
        n, s = np.divmod(np.arange(self.shape[0] * self._rows, dtype=np.int32), np.int32(self._rows))
        blocks = -(-self._rows // self.block)
        block = self._array(n * blocks + s // self.block) + index * (self.shape[0] * blocks)
        return self._signs(keys, block, self._array(s % self.block))

    @property
    def balanced(self) -> bool:
        """Whether blocks run over samples: rows of one position each, in batches of at least half a block."""
        samples, numbers = self.shape
        return self._rows == 1 and numbers > 1 and 2 * samples >= self.block and samples >= LEAST

    @property
    def block(self) -> int:
        """m."""
        return 1 << self._bits

    def pairs(self, index: int | Array) -> PairedProbe:
        """Two probes of a balanced design: the second one swaps the vectors of samples that are neighbours in it."""
        index = self._known(index)
        ints, samples, keys = self._ints, self.shape[0], self._keys(index)
        order = self._order(keys)
        slot = ints.argsort(order)
        other = slot ^ 1
        partner = ints.take(order, ints.where(other < samples, other, slot), axis=0)
        both = self._of_slots(keys, index, ints.concat([slot, other]))
        return PairedProbe(both[:samples, :], both[samples:, :], self.place(partner))

    def drawn(self, size: int) -> Array:
        """(M,) indices of samples drawn at random, ascending: of the first probe's pairs as many as there are in M."""
        return self.place(self._ints.sort(self._order(self._keys(0))[: min(size, self.shape[0])]))

    def drawn_partners(self, size: int) -> Array:
        """(M,) places among the samples drawn, of an even number, at which each one's partner is."""
        slot = self._ints.argsort(self._order(self._keys(0))[:size])  # of those that are drawn, ascending
        return self.place(self._ints.take(self._ints.argsort(slot), slot ^ 1, axis=0))

    @property
    def _ints(self) -> Namespace:
        return np if isinstance(self.seed, np.ndarray) else self.xp

    @property
    def _width(self) -> int:
        return min(self.width or self.shape[1], WIDEST)

    @property
    def _rows(self) -> int:
        """S."""
        return -(-self.shape[1] // self._width)

    @property
    def _bits(self) -> int:
        return max(1, (self._width - 1).bit_length())

    def _known(self, index: int | Array) -> int | Array:
        """A number that was counted on a device, where the seed is known beforehand."""
        return int(index) if self._ints is np else index

    def _array(self, numbers: np.ndarray) -> Array:
        """Whole numbers that are known beforehand, in the seed's framework."""
        return self._ints.asarray(numbers, dtype=self._ints.int32)

    def _keys(self, index: int | Array) -> Array:
        """A random word for each stream, those of probes for this one."""
        ints = self._ints
        keys = self._array(np.arange(1, len(STREAMS) + 1))
        for word in range(self.seed.shape[0]):
            keys = mixed(ints, keys * GOLDEN ^ self.seed[word : word + 1])
        of_probe = self._array(np.asarray([stream in OF_PROBE for stream in STREAMS]))
        return mixed(ints, keys + of_probe * ints.asarray(index, dtype=ints.int32) * GOLDEN)

    def _words(self, keys: Array, stream: int, counter: Array) -> Array:
        """A random int32 word for each number of the counter, of shape (C,)."""
        key = keys[stream : stream + 1]
        return mixed(self._ints, mixed(self._ints, counter ^ key) + key)

    def _order(self, keys: Array) -> Array:
        """(N,) the samples in a random order."""
        return self._ints.argsort(self._words(keys, ORDER, self._array(np.arange(self.shape[0]))))

    def _of_slots(self, keys: Array, index: int | Array, slot: Array) -> Array:
        """Signs of samples at their slots, which go on from probe to probe, so that blocks fill up."""
        x = self._ints.astype(slot, self._ints.int32) + index * (self.shape[0] + self.shape[0] % 2)
        return self._signs(keys, _shifted(self._ints, x, self._bits), x & (self.block - 1))

    def _signs(self, keys: Array, block: Array, x: Array) -> Array:
        """Signs (N, K), or those of several times N samples, of rows at places x of their blocks, (N*S,) each."""
        xp, ints = self.xp, self._ints
        eps = self._bit_signs(self._words(keys, EPS, self._array(np.arange(self._width))))
        sigma = self._bit_signs(self._words(keys, SIGMA, self._array(np.arange(x.shape[0]))))
        a = 1 + (self._words(keys, FACTOR, block) & 0x7FFFFFFF) % (self.block - 1)
        r = product(ints, a, x, self._bits) ^ (self._words(keys, SHIFT, block) & (self.block - 1))
        v = self._rows_of_hadamard(r, sigma) * eps
        samples = x.shape[0] // self._rows
        if self.positions_last:
            v = xp.permute_dims(xp.reshape(v, (samples, self._rows, self._width)), (0, 2, 1))
        return xp.reshape(v, (samples, -1))[:, : self.shape[1]]

    def _rows_of_hadamard(self, r: Array, scale: Array) -> Array:
        """(R, V) the first columns of rows r (R,) of H, each times its scale (R,): those of two factors, multiplied."""
        xp, low = self.xp, self._bits // 2
        columns = -(-self._width >> low)
        high, lower = (xp.astype(self.place(self._table(bits)), self.dtype) for bits in (self._bits - low, low))
        high = xp.take(high[:, :columns], self.place(_shifted(self._ints, r, low)), axis=0)
        lower = xp.take(lower, self.place(r & ((1 << low) - 1)), axis=0) * scale[:, None]
        return xp.reshape(high[:, :, None] * lower[:, None, :], (r.shape[0], -1))[:, : self._width]

    def _table(self, bits: int) -> Array:
        """H of 2^bits rows, in the seed's framework."""
        return self._array(sylvester(bits))

    def _bit_signs(self, words: Array) -> Array:
        """A random sign for each word, by its highest bit."""
        return 1 - 2 * self.xp.astype(self.place(words < 0), self.dtype)


GOLDEN = -0x61C88647
"""2^32 over the golden ratio, as int32: its multiples are far from each other."""


def layout(shapes: Sequence[Sequence[int]], channels_first: bool = False) -> tuple[int, bool]:
    """(V, whether positions come last) of outputs whose parts have these shapes; V = 0 where there are no positions.

    >>> layout([(8, 128, 5000)]), layout([(8, 10)]), layout([(8, 3, 32, 32)], channels_first=True)
    ((5000, False), (0, False), (3, True))
    >>> layout([(8, 3, 32)], channels_first=True), layout([(8, 128, 2)]), layout([(8, 128, 1)])  # sequences
    ((32, False), (2, False), (0, False))
    """
    if len(shapes) != 1 or len(shapes[0]) < 3:
        return 0, False
    last = channels_first and len(shapes[0]) > 3
    width = shapes[0][1 if last else -1]
    return (width, last) if width > 1 else (0, False)


def seed_words(seed: int) -> np.ndarray:
    """The two int32 words of a seed, the higher one first.

    >>> seed_words(2**32 + 7)
    array([1, 7], dtype=int32)
    """
    return np.asarray([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], dtype=np.uint32).view(np.int32)


def seed_of_part(seed: int, part: int) -> int:
    """The seed for a part of a batch, a process's or a piece of a stream: other signs in each part, and at each seed.

    >>> seed_words(seed_of_part(7, 3))
    array([3, 7], dtype=int32)
    """
    return seed + (part << 32)


def mixed(ints: Namespace, x: Array) -> Array:
    """lowbias32 of int32 words, whose products wrap around."""
    x = (x ^ _shifted(ints, x, 16)) * 0x7FEB352D
    x = (x ^ _shifted(ints, x, 15)) * -0x7B935975
    return x ^ _shifted(ints, x, 16)


def product(ints: Namespace, a: Array, x: Array, bits: int) -> Array:
    """a x in the field of 2^bits elements, for int32 a and x below that. Addition in it is XOR.

    >>> product(np, np.asarray([2], dtype="int32"), np.asarray([3], dtype="int32"), bits=2)  # t (t + 1) = t^2 + t = 1
    array([1], dtype=int32)
    """
    total = a * 0
    for bit in range(bits):
        total = total ^ a * (_shifted(ints, x, bit) & 1)
        a = a * 2
        a = a ^ _shifted(ints, a, bits) * (IRREDUCIBLE[bits - 1] | 1 << bits)
    return total


@lru_cache
def sylvester(bits: int) -> np.ndarray:
    """H of 2^bits rows, as int8.

    >>> sylvester(1).tolist()
    [[1, 1], [1, -1]]
    """
    n = np.arange(1 << bits)
    return (1 - 2 * (np.bitwise_count(n[:, None] & n[None, :]) & 1)).astype(np.int8)


def _shifted(ints: Namespace, x: Array, bits: int) -> Array:
    """x shifted to the right by that many bits; its sign is a bit like the others."""
    return ints.bitwise_right_shift(x, bits) & ((1 << 32 - bits) - 1 if bits else -1)
