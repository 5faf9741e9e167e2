r"""Squared norms of per-sample gradients, from what goes into an operation and the cotangent of what comes out.

A weight W that is used at positions s = 1..S inside sample n receives the gradient G_n = sum_s left_ns right_ns^T, with
left the cotangent and right the activation (or the other way round, for a transposed weight). Its squared norm needs
no G_n:

    ||G_n||_F^2 = sum_{s,s'} (left_ns . left_ns') (right_ns . right_ns')     Gram form,   S^2 (rows + columns)
                = ||left_n^T right_n||_F^2                                   direct form, S rows columns

Uses of one weight are joined along s, which includes their cross terms. Pure, on array-API arrays; chunked over the
samples, so that what is in memory at a time stays below a budget.

Source: Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799; sequences: Li, Tramer, Liang,
Hashimoto, arXiv 2110.05679; convolutions: Bu, Mao, Xu, arXiv 2205.10683.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lnp.contract.linearization import Array, accumulation_dtype, device_of

BUDGET = 2**22
"""Numbers that are in memory at a time, beside what is given."""
ON_A_DEVICE = 2**25
"""The same on a GPU, which has no use for small caches, and waits for the launches of small pieces."""
GRAM_ADVANTAGE = 1.2
"""How many times fewer multiplications the Gram form needs to be preferred: its products are smaller."""

HALVED = 16
"""Positions in half of a Gram matrix from which on a quarter of it is left out: products of fewer are slow."""


def outer(xp: Any, left: Array, right: Array, advantage: float = GRAM_ADVANTAGE, budget: int = BUDGET) -> Array:
    """||sum_s left[n, s] right[n, s]^T||_F^2 for left (N, S, p) and right (N, S, q). Shape (N,).

    >>> import numpy
    >>> left, right = numpy.array([[[1.0], [2.0]]]), numpy.array([[[3.0], [-1.0]]])
    >>> float(outer(numpy, left, right)[0])
    1.0
    """
    positions, rows, columns = left.shape[1], left.shape[2], right.shape[2]
    if positions == 1:
        return dense(xp, left) * dense(xp, right)
    direct, gram = rows * columns, positions * (rows + columns)
    if gram * advantage <= direct:
        return chunked(xp, lambda a, b: _gram(xp, a, b), (left, right), 2 * positions**2, budget)

    def direct_form(a: Array, b: Array) -> Array:
        return _direct(xp, xp.matrix_transpose(a), xp.matrix_transpose(b))

    return chunked(xp, direct_form, (left, right), direct, budget)


def rows(xp: Any, index: Array, values: Array, budget: int = BUDGET) -> Array:
    """||sum_s e_{index[n, s]} values[n, s]^T||_F^2 for index (N, S) and values (N, S, q): an embedding. Shape (N,).

    Rows that are looked up more than once in a sample add before they are squared. Rows of negative index are left
    out.
    """

    def chunk(index: Array, values: Array) -> Array:
        return xp.sum(_same_row(xp, index, index, values.dtype) * _products(xp, values, values), axis=(1, 2))

    if index.shape[1] == 1:
        return dense(xp, xp.where((index >= 0)[:, :, None], values, xp.zeros_like(values)))
    return chunked(xp, chunk, (index, _wide(xp, values)), 2 * index.shape[1] ** 2, budget)


def rows_and_outer(xp: Any, index: Array, values: Array, left: Array, right: Array, budget: int = BUDGET) -> Array:
    """<sum_s e_{index[n, s]} values[n, s]^T, sum_t left[n, t] right[n, t]^T> for an embedding that is tied to a head.

    index (N, S), values (N, S, q), left (N, T, p), right (N, T, q). Shape (N,).
    """

    def chunk(index: Array, values: Array, left: Array, right: Array) -> Array:
        looked_up = xp.where((index >= 0)[:, None, :], _take(xp, left, index), xp.zeros_like(left[:, :, :1]))
        return xp.sum(looked_up * _products(xp, right, values), axis=(1, 2))

    arrays = (index, *(_wide(xp, array) for array in (values, left, right)))
    return chunked(xp, chunk, arrays, 3 * index.shape[1] * left.shape[1], budget)


def dense(xp: Any, gradients: Array) -> Array:
    """||gradients[n]||^2 for gradients (N, ...) that are there. Shape (N,)."""
    flat = _wide(xp, xp.reshape(gradients, (gradients.shape[0], -1)))
    return xp.linalg.vector_norm(flat, axis=1) ** 2


@dataclass(frozen=True)
class Window:
    """How a convolution slides.

    Attributes
    ----------
    kernel, stride, dilation:
        One number for each spatial axis.
    groups:
        Into which the channels fall.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


PATCHES = 2**19
"""Numbers of patches that are in memory at a time: what a processor's cache holds. Fewer, for small batches, took twice
the time where a kernel has many offsets (ConvNeXt's 49), each of which is cut out for each piece of the batch.
"""
ADDITION = 20
"""Multiplications of a matrix product that take as long as adding one number that lies in memory."""


def convolution(xp: Any, x: Array, d: Array, window: Window, budget: int = BUDGET, patches: int = PATCHES) -> Array:
    """||dL_n/dW||^2 of the weight of y = x * W, where x (N, C, ...) is padded already and d (N, O, ...) is the
    cotangent of y. Shape (N,). For a transposed convolution x and d change places.

    In the direct form the patches under the kernel are formed for a few samples at a time, so that one product makes
    their gradients, or, where those of one sample are too many, for some of the kernel's offsets. In the Gram form
    the inner products of patches are sums over the kernel's offsets of those of single places, which are computed once.
    """
    channels, outputs = x.shape[1] // window.groups, d.shape[1] // window.groups
    parts, places, positions = d.shape[0] * window.groups, math.prod(x.shape[2:]), math.prod(d.shape[2:])
    x, d = xp.reshape(x, (parts, channels, *x.shape[2:])), xp.reshape(d, (parts, outputs, *d.shape[2:]))
    gram = places**2 * channels + positions**2 * outputs + ADDITION * _additions(x.shape[2:], d.shape[2:], window)
    patch = channels * math.prod(window.kernel)
    if gram * GRAM_ADVANTAGE <= positions * patch * outputs:
        form: Callable[..., Array] = _convolution_gram
        size, limit = 2 * places**2 + positions**2, budget
    else:
        form = partial(_convolution_direct, patches=room(x, patches))
        size, limit = patch * positions, patches
    norms = chunked(xp, lambda x, d: form(xp, x, d, window), (x, d), size, limit)
    return xp.sum(xp.reshape(norms, (-1, window.groups)), axis=1)


def convolution_gradients(xp: Any, x: Array, d: Array, window: Window) -> Array:
    """dL_n/dW (N, O, C, *kernel) themselves, of the weight whose squared norms `convolution` gives."""
    channels, outputs, parts = x.shape[1] // window.groups, d.shape[1], d.shape[0] * window.groups
    x = xp.reshape(_wide(xp, x), (parts, channels, *x.shape[2:]))
    d = xp.reshape(_wide(xp, d), (parts, outputs // window.groups, *d.shape[2:]))
    found = xp.matmul(xp.reshape(d, (*d.shape[:2], -1)), xp.matrix_transpose(_patches(xp, x, _offsets(d, window))))
    offsets_first = xp.reshape(found, (-1, outputs, math.prod(window.kernel), channels))
    return xp.reshape(xp.matrix_transpose(offsets_first), (-1, outputs, channels, *window.kernel))


def _offsets(d: Array, window: Window) -> list[tuple[slice, ...]]:
    """Where x lies under each offset of the kernel."""
    return list(itertools.product(*(_cuts(axis, size, window) for axis, size in enumerate(d.shape[2:]))))


def _patches(xp: Any, x: Array, offsets: Sequence[tuple[slice, ...]]) -> Array:
    """(N, offsets * C, positions): what lies under these offsets of the kernel."""
    pieces = xp.stack([x[(slice(None), slice(None), *cuts)] for cuts in offsets], axis=1)
    return xp.reshape(pieces, (x.shape[0], len(offsets) * x.shape[1], -1))


def _convolution_direct(xp: Any, x: Array, d: Array, window: Window, patches: int) -> Array:
    """||dL_n/dW||^2, for as many offsets of the kernel at a time as there is room for their patches. Shape (N,)."""
    offsets, flat = _offsets(d, window), xp.reshape(d, (*d.shape[:2], -1))
    count = max(1, patches // (x.shape[0] * x.shape[1] * flat.shape[2]))
    starts = range(0, len(offsets), count)
    found = [_direct(xp, flat, _patches(xp, x, offsets[start : start + count])) for start in starts]
    return sum(found[1:], start=found[0])


def _convolution_gram(xp: Any, x: Array, d: Array, window: Window) -> Array:
    """||dL_n/dW||^2 from inner products of single places, summed over the kernel's offsets axis by axis. Shape (N,)."""
    products = _own_products(xp, x)
    for axis in range(len(window.kernel)):  # patches at s and t: the sum over offsets o of places s + o and t + o
        pieces = []
        for cut in _cuts(axis, d.shape[2 + axis], window):
            index = [slice(None)] * products.ndim
            index[1 + axis] = index[1 + len(window.kernel) + axis] = cut
            pieces.append(products[tuple(index)])
        products = sum(pieces[1:], start=pieces[0])
    return xp.sum(xp.reshape(products * _own_products(xp, d), (x.shape[0], -1)), axis=1)


def _own_products(xp: Any, x: Array) -> Array:
    """Inner products over the channels of x (N, C, ...) between any two places, (N, ..., ...)."""
    flat = _wide(xp, xp.reshape(x, (*x.shape[:2], -1)))
    return xp.reshape(xp.matmul(xp.matrix_transpose(flat), flat), (x.shape[0], *x.shape[2:], *x.shape[2:]))


def _additions(places: Sequence[int], positions: Sequence[int], window: Window) -> int:
    """Of the sums over a kernel's offsets, one axis after the other."""
    sizes, total = list(places), 0
    for axis, size in enumerate(positions):
        sizes[axis] = size
        total += window.kernel[axis] * math.prod(sizes) ** 2
    return total


def _cuts(axis: int, positions: int, window: Window) -> list[slice]:
    """Where an axis of x lies under each offset of the kernel."""
    stride, first = window.stride[axis], [o * window.dilation[axis] for o in range(window.kernel[axis])]
    return [slice(start, start + (positions - 1) * stride + 1, stride) for start in first]


def _direct(xp: Any, left: Array, right: Array) -> Array:
    """||left[n] right[n]^T||_F^2 for left (N, p, S) and right (N, q, S)."""
    if left.dtype != getattr(xp, "bfloat16", None):  # whose range is wide enough; products are rounded, not biased
        left, right = _wide(xp, left), _wide(xp, right)
    return dense(xp, xp.matmul(left, xp.matrix_transpose(right)))


def _gram(xp: Any, left: Array, right: Array) -> Array:
    """||left[n]^T right[n]||_F^2 for left (N, S, p) and right (N, S, q), from products between places. Shape (N,)."""
    left, right, half = _wide(xp, left), _wide(xp, right), left.shape[1] // 2

    def block(some: slice, others: slice) -> Array:
        return _products(xp, left[:, some], left[:, others]) * _products(xp, right[:, some], right[:, others])

    if half < HALVED:
        return xp.sum(block(slice(None), slice(None)), axis=(1, 2))
    first, second = block(slice(half), slice(None)), block(slice(half, None), slice(half, None))  # it is symmetric
    return xp.sum(first, axis=(1, 2)) + xp.sum(first[:, :, half:], axis=(1, 2)) + xp.sum(second, axis=(1, 2))


def _products(xp: Any, a: Array, b: Array) -> Array:
    """(N, S, T) inner products of a (N, S, q) and b (N, T, q)."""
    return xp.matmul(a, xp.matrix_transpose(b))


def _same_row(xp: Any, a: Array, b: Array, dtype: Any) -> Array:
    return xp.astype((a[:, :, None] == b[:, None, :]) & (a >= 0)[:, :, None], dtype)


def _take(xp: Any, left: Array, index: Array) -> Array:
    """left[n, t, index[n, s]] as (N, T, S)."""
    samples, positions, _ = left.shape
    clipped = xp.where(index >= 0, index, xp.zeros_like(index))
    wanted = xp.broadcast_to(clipped[:, None, :], (samples, positions, index.shape[1]))
    return xp.take_along_axis(left, wanted, axis=2)


def chunked(xp: Any, function: Callable[..., Array], arrays: tuple[Array, ...], size: int, budget: int) -> Array:
    """function(*arrays), on as many samples at a time as the budget holds at `size` numbers each."""
    samples = arrays[0].shape[0]
    chunk = max(1, room(arrays[0], budget) // max(size, 1))
    if chunk >= samples:
        return function(*arrays)
    starts = range(0, samples, chunk)
    return xp.concat([function(*(array[s : s + chunk] for array in arrays)) for s in starts], axis=0)


def room(array: Array, budget: int) -> int:
    """Numbers that are in memory at a time where an array lies."""
    return budget if getattr(device_of(array), "type", "cpu") == "cpu" else max(budget, ON_A_DEVICE)


def _wide(xp: Any, array: Array) -> Array:
    return xp.astype(array, accumulation_dtype(xp, array.dtype), copy=False)
