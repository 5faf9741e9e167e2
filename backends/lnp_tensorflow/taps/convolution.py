"""Squared norms of a convolution's per-sample weight gradients, with channels last as TensorFlow has them on a CPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import tensorflow as tf

from lnp.per_sample import norms
from lnp.per_sample.norms import Window
from lnp_tensorflow import array_namespace as xp

CACHED = 2**19
"""Numbers of the direct form that are in memory at a time: what a processor's cache holds."""
GRAM_ADVANTAGE = 1.4
"""How many times fewer multiplications the Gram form needs to be preferred."""
ADDED = 8
"""Multiplications that take as long as adding a number of a Gram matrix."""


def convolution(x: tf.Tensor, d: tf.Tensor, window: Window) -> tf.Tensor:
    """||dL_n/dW||^2 for x (N, ..., C), padded already, and the cotangent d (N, ..., O) of y = x * W. Shape (N,).

    Each offset of the kernel is one product of d with the shifted x: no patches are formed. Where there are many
    channels for few positions, one Gram matrix of x is shifted instead. `lnp.per_sample.norms.convolution` does the
    same with channels first, and knows groups and Gram matrices of what strides leave; transposing to it takes longer
    here.
    """
    positions, taps = math.prod(d.shape[1:-1]), math.prod(window.kernel)
    channels, outputs = x.shape[-1], d.shape[-1]
    direct = positions * channels * outputs * taps
    places, used = math.prod(x.shape[1:-1]), _used(x, d)
    gram = places**2 * channels + used**2 * (outputs + ADDED * taps)
    if window.groups == 1 and set(window.stride) == {1} and GRAM_ADVANTAGE * gram < direct:
        return _chunked(_gram, x, d, window, norms.BUDGET // (2 * (places**2 + used**2)))
    if window.groups > 1 or 3 * positions * (channels * taps + outputs) < channels * outputs * taps:
        return norms.convolution(xp, _channels_first(x), _channels_first(d), window)
    return _chunked(_direct, x, d, window, CACHED // (places * channels + outputs * (positions + channels)))


def _chunked(form: Callable, x: tf.Tensor, d: tf.Tensor, window: Window, size: int) -> tf.Tensor:
    """A form on `size` samples at a time."""
    size = max(size, 1)
    parts = [form(x[s : s + size], d[s : s + size], window) for s in range(0, x.shape[0], size)]
    return parts[0] if len(parts) == 1 else tf.concat(parts, 0)


def _direct(x: tf.Tensor, d: tf.Tensor, window: Window) -> tf.Tensor:
    samples = x.shape[0]
    flat, total = tf.reshape(d, (samples, -1, d.shape[-1])), None
    for piece in _shifted(x, d.shape[1:-1], window):
        gradient = tf.reshape(tf.matmul(piece, flat, transpose_a=True), (samples, -1))
        squared = tf.reduce_sum(gradient**2, 1)
        total = squared if total is None else total + squared
    return total


def _gram(x: tf.Tensor, d: tf.Tensor, window: Window) -> tf.Tensor:
    """sum_{s,s'} (d_s . d_s') sum_o x_{s+o} . x_{s'+o}, with positions s numbered as those of x are.

    A shift by an offset o is then one by a number of places, and the inner sum is one of blocks of x's Gram matrix.
    """
    samples, sizes, used = x.shape[0], tuple(x.shape[1:-1]), _used(x, d)
    missing = [(0, 0), *((0, there - here) for there, here in zip(sizes, d.shape[1:-1], strict=True)), (0, 0)]
    flat, right = tf.reshape(x, (samples, -1, x.shape[-1])), tf.reshape(tf.pad(d, missing), (samples, -1, d.shape[-1]))
    products, total = tf.matmul(flat, flat, transpose_b=True), None
    for offset in _offsets(window):
        start = _place(offset, sizes)
        block = products[:, start : start + used, start : start + used]
        total = block if total is None else total + block
    right = right[:, :used]
    return tf.reduce_sum(total * tf.matmul(right, right, transpose_b=True), (1, 2))


def _used(x: tf.Tensor, d: tf.Tensor) -> int:
    """Positions of x from the first to the last that d has."""
    return _place([size - 1 for size in d.shape[1:-1]], tuple(x.shape[1:-1])) + 1


def _place(index: tuple | list, sizes: tuple) -> int:
    """The number of a position."""
    place = 0
    for i, size in zip(index, sizes, strict=True):
        place = place * size + i
    return place


def _shifted(x: tf.Tensor, sizes: Iterable[int], window: Window) -> Iterator[tf.Tensor]:
    """x (N, positions, C) at each offset of the kernel."""
    for offset in _offsets(window):
        cut = tuple(
            slice(o, o + (size - 1) * stride + 1, stride)
            for o, stride, size in zip(offset, window.stride, sizes, strict=True)
        )
        yield tf.reshape(x[(slice(None), *cut)], (x.shape[0], -1, x.shape[-1]))


def _offsets(window: Window) -> Iterator[tuple[int, ...]]:
    """By how many positions each element of the kernel shifts x."""
    steps = (range(0, size * step, step) for size, step in zip(window.kernel, window.dilation, strict=True))
    return itertools.product(*steps)


def _channels_first(array: tf.Tensor) -> tf.Tensor:
    rank = array.shape.rank
    return tf.transpose(array, [0, rank - 1, *range(1, rank - 1)])


def along_convolution(x: tf.Tensor, d: tf.Tensor, window: Window, u: tf.Tensor) -> tf.Tensor:
    """<dL_n/dW, u> = (x_n * u) . d_n for u of the weight's shape, with groups as TensorFlow has them. Shape (N,)."""
    groups, channels, outputs = window.groups, x.shape[-1] // window.groups, d.shape[-1] // window.groups
    if groups == 1 and d.shape.rank < 6:
        kernel = tf.reshape(u, (*window.kernel, channels, outputs))
        made = tf.nn.convolution(x, kernel, window.stride, "VALID", None, window.dilation)
        whole = (slice(None), *(slice(size) for size in d.shape[1:-1]))
        return tf.reduce_sum(made[whole] * d, range(1, d.shape.rank))
    if channels == 1 and u.shape[-2] == groups:  # depthwise
        kernels = tf.reshape(u, (-1, groups, 1, outputs))
    else:
        kernels = tf.transpose(tf.reshape(u, (-1, channels, groups, outputs)), (0, 2, 1, 3))
    flat, total = tf.reshape(d, (d.shape[0], -1, groups, outputs)), None
    for piece, kernel in zip(_shifted(x, d.shape[1:-1], window), tf.unstack(kernels), strict=True):
        pulled = tf.einsum("nsgo,gco->nsgc", flat, kernel)
        product = tf.reduce_sum(pulled * tf.reshape(piece, pulled.shape), (1, 2, 3))
        total = product if total is None else total + product
    return total
