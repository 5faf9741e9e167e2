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
from typing import Any

from lnp.linearization import Array, accumulation_dtype

BUDGET = 2**22
"""Numbers that are in memory at a time, beside what is given."""
GRAM_ADVANTAGE = 1.2
"""How many times fewer multiplications the Gram form needs to be preferred: its products are smaller."""


def outer(xp: Any, left: Array, right: Array, advantage: float = GRAM_ADVANTAGE, budget: int = BUDGET) -> Array:
    """||sum_s left[n, s] right[n, s]^T||_F^2 for left (N, S, p) and right (N, S, q). Shape (N,).

    >>> import numpy
    >>> left, right = numpy.array([[[1.0], [2.0]]]), numpy.array([[[3.0], [-1.0]]])
    >>> float(outer(numpy, left, right)[0])
    1.0
    """
    positions, rows, columns = left.shape[1], left.shape[2], right.shape[2]
    if positions == 1:
        return explicit(xp, left) * explicit(xp, right)
    direct, gram = rows * columns, positions * (rows + columns)
    if gram * advantage <= direct:
        return _chunked(xp, lambda a, b: _gram(xp, a, b), (left, right), 2 * positions**2, budget)
    turned = lambda a, b: _direct(xp, xp.matrix_transpose(a), xp.matrix_transpose(b))
    return _chunked(xp, turned, (left, right), direct, budget)


def rows(xp: Any, index: Array, values: Array, budget: int = BUDGET) -> Array:
    """||sum_s e_{index[n, s]} values[n, s]^T||_F^2 for index (N, S) and values (N, S, q): an embedding. Shape (N,).

    Rows that are looked up more than once in a sample add before they are squared. Rows of negative index are left
    out.
    """

    def chunk(index: Array, values: Array) -> Array:
        return xp.sum(_same_row(xp, index, index, values.dtype) * _products(xp, values, values), axis=(1, 2))

    if index.shape[1] == 1:
        return explicit(xp, xp.where((index >= 0)[:, :, None], values, xp.zeros_like(values)))
    return _chunked(xp, chunk, (index, _wide(xp, values)), 2 * index.shape[1] ** 2, budget)


def rows_and_outer(xp: Any, index: Array, values: Array, left: Array, right: Array, budget: int = BUDGET) -> Array:
    """<sum_s e_{index[n, s]} values[n, s]^T, sum_t left[n, t] right[n, t]^T> for an embedding that is tied to a head.

    index (N, S), values (N, S, q), left (N, T, p), right (N, T, q). Shape (N,).
    """

    def chunk(index: Array, values: Array, left: Array, right: Array) -> Array:
        looked_up = xp.where((index >= 0)[:, None, :], _take(xp, left, index), xp.zeros_like(left[:, :, :1]))
        return xp.sum(looked_up * _products(xp, right, values), axis=(1, 2))

    arrays = (index, *(_wide(xp, array) for array in (values, left, right)))
    return _chunked(xp, chunk, arrays, 3 * index.shape[1] * left.shape[1], budget)


def explicit(xp: Any, gradients: Array) -> Array:
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


PATCHES = 2**20
"""Numbers of patches that are in memory at a time: what a processor's cache holds."""


def convolution(xp: Any, x: Array, d: Array, window: Window, budget: int = BUDGET, patches: int = PATCHES) -> Array:
    """||dL_n/dW||^2 of the weight of y = x * W, where x (N, C, ...) is padded already and d (N, O, ...) is the
    cotangent of y. Shape (N,). For a transposed convolution x and d change places.

    The patches under the kernel are formed for a few samples at a time, so that one product makes their gradients;
    where the Gram matrix over positions needs far fewer multiplications, that is summed over the kernel's offsets.
    """
    positions, taps = math.prod(d.shape[2:]), math.prod(window.kernel)
    channels, outputs = x.shape[1] // window.groups, d.shape[1] // window.groups
    parts = d.shape[0] * window.groups
    x, d = xp.reshape(x, (parts, channels, *x.shape[2:])), xp.reshape(d, (parts, outputs, *d.shape[2:]))
    gram = 3 * positions * (channels * taps + outputs) < channels * outputs * taps
    if gram:
        norms = _chunked(
            xp,
            lambda x, d: _convolution_gram(xp, x, d, window),
            (x, d),
            2 * positions**2 + positions * channels,
            budget,
        )
    else:
        norms = _chunked(
            xp, lambda x, d: _convolution_direct(xp, x, d, window), (x, d), channels * taps * positions, patches
        )
    return xp.sum(xp.reshape(norms, (-1, window.groups)), axis=1)


def _convolution_direct(xp: Any, x: Array, d: Array, window: Window) -> Array:
    stacked = xp.stack(list(_shifted(xp, x, d.shape[2:], window)), axis=1)
    return _direct(xp, xp.reshape(d, (*d.shape[:2], -1)), xp.reshape(stacked, (d.shape[0], -1, stacked.shape[-1])))


def _convolution_gram(xp: Any, x: Array, d: Array, window: Window) -> Array:
    flat, total = _wide(xp, xp.reshape(d, (*d.shape[:2], -1))), None
    for piece in _shifted(xp, _wide(xp, x), d.shape[2:], window):
        products = xp.matmul(xp.matrix_transpose(piece), piece)
        total = products if total is None else total + products
    return xp.sum(total * xp.matmul(xp.matrix_transpose(flat), flat), axis=(1, 2))


def _shifted(xp: Any, x: Array, out: Sequence[int], window: Window) -> Any:
    """x (N, C, positions) at each offset of the kernel."""
    for offset in _offsets(window):
        cut = tuple(
            slice(o * dilation, o * dilation + (size - 1) * stride + 1, stride)
            for o, dilation, stride, size in zip(offset, window.dilation, window.stride, out, strict=True)
        )
        yield xp.reshape(x[(slice(None), slice(None), *cut)], (*x.shape[:2], -1))


def _offsets(window: Window) -> Any:
    return itertools.product(*(range(size) for size in window.kernel))


def _direct(xp: Any, left: Array, right: Array) -> Array:
    """||left[n] right[n]^T||_F^2 for left (N, p, S) and right (N, q, S)."""
    if left.dtype != getattr(xp, "bfloat16", None):  # whose range is wide enough; products are rounded, not biased
        left, right = _wide(xp, left), _wide(xp, right)
    return explicit(xp, xp.matmul(left, xp.matrix_transpose(right)))


def _gram(xp: Any, left: Array, right: Array) -> Array:
    left, right = _wide(xp, left), _wide(xp, right)
    return xp.sum(_products(xp, left, left) * _products(xp, right, right), axis=(1, 2))


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


def _chunked(xp: Any, function: Callable[..., Array], arrays: tuple[Array, ...], size: int, budget: int) -> Array:
    """function(*arrays), on as many samples at a time as the budget holds at `size` numbers each."""
    samples = arrays[0].shape[0]
    chunk = max(1, budget // max(size, 1))
    if chunk >= samples:
        return function(*arrays)
    starts = range(0, samples, chunk)
    return xp.concat([function(*(array[s : s + chunk] for array in arrays)) for s in starts], axis=0)


def _wide(xp: Any, array: Array) -> Array:
    return xp.astype(array, accumulation_dtype(xp, array.dtype), copy=False)
