"""Squared norms of a convolution's per-sample weight gradients, with channels last as TensorFlow has them on a CPU."""

from __future__ import annotations

import itertools
import math

import tensorflow as tf

from lnp import norms
from lnp.norms import Window
from lnp_tensorflow import namespace as xp


def convolution(x: tf.Tensor, d: tf.Tensor, window: Window) -> tf.Tensor:
    """||dL_n/dW||^2 for x (N, ..., C), padded already, and the cotangent d (N, ..., O) of y = x * W. Shape (N,).

    Each offset of the kernel is one product of d with the shifted x: no patches are formed. `lnp.norms.convolution`
    does the same with channels first, and knows groups and the Gram form; transposing to it takes longer here.
    """
    positions, taps = math.prod(d.shape[1:-1]), math.prod(window.kernel)
    channels, outputs = x.shape[-1], d.shape[-1]
    if window.groups > 1 or 3 * positions * (channels * taps + outputs) < channels * outputs * taps:
        return norms.convolution(xp, _channels_first(x), _channels_first(d), window)
    chunk = max(1, norms.BUDGET // (channels * (outputs + positions)))
    parts = [_direct(x[s : s + chunk], d[s : s + chunk], window) for s in range(0, x.shape[0], chunk)]
    return parts[0] if len(parts) == 1 else tf.concat(parts, 0)


def _direct(x: tf.Tensor, d: tf.Tensor, window: Window) -> tf.Tensor:
    samples, sizes = x.shape[0], tuple(d.shape[1:-1])
    flat, total = tf.reshape(d, (samples, -1, d.shape[-1])), None
    for offset in itertools.product(*(range(size) for size in window.kernel)):
        cut = tuple(
            slice(o * dilation, o * dilation + (size - 1) * stride + 1, stride)
            for o, dilation, stride, size in zip(offset, window.dilation, window.stride, sizes, strict=True)
        )
        piece = tf.reshape(x[(slice(None), *cut)], (samples, -1, x.shape[-1]))
        gradient = tf.reshape(tf.matmul(piece, flat, transpose_a=True), (samples, -1))
        squared = tf.reduce_sum(gradient**2, 1)
        total = squared if total is None else total + squared
    return total


def _channels_first(array: tf.Tensor) -> tf.Tensor:
    rank = array.shape.rank
    return tf.transpose(array, [0, rank - 1, *range(1, rank - 1)])
