"""Weights (E, p, q) of experts, between which the positions of all samples are divided.

    G_n = sum_r e_expert[r] x left[r] x right[r]    (outer products) over the rows r of sample n

with left (R, p) and right (R, q), whose rows lie in any order. Whose they are is read off numbers: for arrays that have
values.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lnp.contract.linearization import Array, device_of
from lnp.per_sample import norms


@dataclass(frozen=True, eq=False)
class Sent:
    """Which rows are sent where.

    Attributes
    ----------
    xp:
        Namespace of the arrays.
    sample, expert:
        Numbers of each row's sample and expert, (R,). Rows with a negative one are left out.
    samples, experts:
        N and E.
    """

    xp: Any
    sample: Array
    expert: Array
    samples: int
    experts: int

    def of(self, some: Array | slice) -> Sent:
        """The rows of some samples, which get the numbers of their places in `some`."""
        xp = self.xp
        chosen = xp.arange(self.samples, dtype=self.sample.dtype, device=device_of(self.sample))[some]
        same = self.sample[:, None] == chosen[None, :]
        place = xp.argmax(xp.astype(same, xp.int8), axis=1)
        sample = xp.where(xp.any(same, axis=1), place, -1)
        return Sent(xp, sample, self.expert, chosen.shape[0], self.experts)

    @cached_property
    def by_pair(self) -> Sorted:
        """The rows in the order of their samples, and of their experts in these."""
        pair = self.experts * self.sample + self.expert
        left_out = (self.sample < 0) | (self.expert < 0)
        return in_order(self.xp, self.xp.where(left_out, -1, pair), self.samples * self.experts)

    @cached_property
    def by_expert(self) -> Sorted:
        """The rows in the order of their experts, with those of no sample."""
        return in_order(self.xp, self.expert, self.experts)


@dataclass(frozen=True, eq=False)
class Sorted:
    """Rows in the order of their numbers. What was found out once serves all cotangents.

    Attributes
    ----------
    xp:
        Namespace of the arrays.
    rows:
        (R,), those of negative numbers first.
    starts:
        Where each number's begin among them, and where the last one's end.
    """

    xp: Any
    rows: Array
    starts: Array

    @cached_property
    def bounds(self) -> list[int]:
        """`starts` as numbers."""
        return [int(start) for start in self.starts.tolist()]

    @cached_property
    def by_size(self) -> dict[int, list[int]]:
        """{power of two: the numbers that fill more than half of so many places, and no more}."""
        found: dict[int, list[int]] = {}
        for number, (begin, end) in enumerate(itertools.pairwise(self.bounds)):
            if end > begin:
                found.setdefault(1 << (end - begin - 1).bit_length(), []).append(number)
        return found

    @cached_property
    def batches(self) -> list[tuple[int, Array]]:
        """`by_size`, with the numbers as arrays."""
        return [(size, self._array(numbers)) for size, numbers in self.by_size.items()]

    @cached_property
    def places(self) -> Array:
        """Where each number stands among those of all batches, from 1 on; 0 for one that has no rows."""
        places = [0] * (len(self.bounds) - 1)
        for place, number in enumerate(itertools.chain(*self.by_size.values()), start=1):
            places[number] = place
        return self._array(places)

    def _array(self, numbers: list[int]) -> Array:
        return self.xp.asarray(numbers, dtype=self.starts.dtype, device=device_of(self.starts))


def in_order(xp: Any, numbers: Array, count: int) -> Sorted:
    """Rows in the order of their numbers 0..count-1."""
    rows = xp.argsort(numbers, stable=True)
    every = xp.arange(count + 1, dtype=numbers.dtype, device=device_of(numbers))
    return Sorted(xp, rows, xp.searchsorted(numbers[rows], every))


def square_norms(sent: Sent, left: Array, right: Array, budget: int = norms.BUDGET) -> Array:
    """||G_n||^2, the sum over experts of ||sum_r left[r] right[r]^T||^2 over what n sends to them. Shape (N,).

    >>> import numpy
    >>> sent = Sent(numpy, numpy.array([0, 0, 0]), numpy.array([0, 1, 0]), samples=1, experts=2)
    >>> float(square_norms(sent, numpy.array([[1.0], [2.0], [3.0]]), numpy.ones((3, 1)))[0])
    20.0
    """
    xp, order = sent.xp, sent.by_pair
    if left.shape[1] > right.shape[1]:
        left, right = right, left
    found = [norms.dense(xp, xp.zeros_like(left[:1]))]
    for size, pairs in order.batches:

        def of_some(pairs: Array, size: int = size) -> Array:
            """Of pairs of a sample and an expert, with zeros where one has fewer rows than others."""
            begin, end = order.starts[pairs][:, None], order.starts[pairs + 1][:, None]
            place = begin + xp.arange(size, dtype=begin.dtype, device=device_of(begin))[None, :]
            rows = order.rows[xp.where(place < end, place, begin)]
            padded = xp.where((place < end)[:, :, None], left[rows], xp.zeros_like(left[:1]))
            return norms.outer(xp, padded, right[rows], budget=budget)

        found.append(norms.chunked(xp, of_some, (pairs,), size * (left.shape[1] + right.shape[1]), budget))
    squares = xp.concat(found)[order.places]
    return xp.sum(xp.reshape(squares, (sent.samples, sent.experts)), axis=1)


def gradients(sent: Sent, left: Array, right: Array) -> Array:
    """G_n themselves, (N, E, p, q)."""
    xp, order = sent.xp, sent.by_pair
    rows = [order.rows[begin:end] for begin, end in itertools.pairwise(order.bounds)]
    found = [xp.matmul(xp.matrix_transpose(left[some]), right[some]) for some in rows]
    return xp.reshape(xp.stack(found), (sent.samples, sent.experts, left.shape[1], right.shape[1]))


def inner_products(sent: Sent, left: Array, right: Array, u: Array) -> Array:
    """<G_n, u> for u (E, p, q), from (left[r] u[expert[r]]) . right[r]. Shape (N,)."""
    xp, order = sent.xp, sent.by_expert
    u = xp.astype(u, left.dtype, copy=False)
    parts = [xp.zeros_like(left[:0, 0])]
    for expert, (begin, end) in enumerate(itertools.pairwise(order.bounds)):
        rows = order.rows[begin:end]
        parts.append(xp.sum(xp.matmul(left[rows], u[expert, ...]) * right[rows], axis=1))
    products, sample = xp.concat(parts), sent.sample[order.rows[order.bounds[0] :]]
    own = sample[None, :] == xp.arange(sent.samples, dtype=sample.dtype, device=device_of(sample))[:, None]
    return xp.matmul(xp.astype(own, products.dtype), products)
