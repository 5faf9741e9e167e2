"""Inner products of single samples' gradients with a vector in parameter space, from what taps say of them.

What an operation uses is often a part of a parameter, or a parameter in another shape: its frame says how to get there.
The vector takes the same way, and meets the factors of the gradient where they are.
"""

from __future__ import annotations

import math

import tensorflow as tf

from lnp_tensorflow.taps.convolution import along_convolution
from lnp_tensorflow.taps.rules import Use


def along(use: Use, u: tf.Tensor, index: tf.Tensor | None, samples: int) -> tf.Tensor:
    """<gradient of sample m by one use, u> for the samples of an index (M,) or all, with u of the parameter's shape.

    outer      sum_s (left_ms u) . right_ms
    rows       sum_s u[index_ms] . values_ms
    dense      gradient_m . u
    window     (x_m * u) . d_m
    """
    some = [_rows(factor, index, samples) if tf.is_tensor(factor) else factor for factor in use.factors]
    dtype = next(factor.dtype for factor in some if tf.is_tensor(factor) and factor.dtype.is_floating)
    u = seen(tf.cast(u, dtype), use.frame)
    if use.kind == "convolution":
        return along_convolution(some[0][:, 0], some[1][:, 0], some[2], u)
    if use.kind == "rows":
        rows, values = some[0][:, 0], some[1][:, 0]
        found = tf.gather(tf.reshape(u, (u.shape[0], -1)), tf.maximum(rows, 0))
        product = tf.where((rows >= 0)[:, :, None], found * values, tf.zeros_like(values))
    elif use.kind == "outer":
        left, right = some  # (M, blocks, S, p) and (M, blocks, S, q)
        blocks, rows = left.shape[1], left.shape[3]
        # not by broadcasting the matrices: TensorFlow 2.21's oneDNN kernel for that corrupts memory
        by_block = tf.reshape(tf.transpose(left, (1, 0, 2, 3)) if blocks > 1 else left, (blocks, -1, rows))
        product = tf.matmul(by_block, tf.reshape(u, (blocks, rows, -1)))
        product *= tf.reshape(tf.transpose(right, (1, 0, 2, 3)) if blocks > 1 else right, product.shape)
        return tf.reduce_sum(tf.reshape(product, (blocks, left.shape[0], -1)), (0, 2))
    else:
        product = some[0] * tf.reshape(u, some[0].shape[2:])
    return tf.reduce_sum(product, range(1, product.shape.rank))


def _rows(factor: tf.Tensor, index: tf.Tensor | None, samples: int) -> tf.Tensor:
    """(M, blocks, ...) of (N * blocks, ...)."""
    by_sample = tf.reshape(factor, (samples, -1, *factor.shape[1:]))
    return by_sample if index is None else tf.gather(by_sample, index)


def seen(u: tf.Tensor, frame: tuple) -> tf.Tensor:
    """A parameter as a frame shows it."""
    for kind, *what in frame:
        if kind == "reshape":
            u = tf.reshape(u, what[0])
        elif kind == "transpose":
            u = tf.transpose(u, what[0])
        elif kind == "slice":
            u = u[tuple(slice(a, None if step < 0 and b < 0 else b, step) for a, b, step in what[0])]
        elif kind == "matrix":
            order, shared, rows = what
            u = tf.transpose(u, order)
            u = tf.reshape(u, (math.prod(u.shape[:shared]), math.prod(u.shape[shared : shared + rows]), -1))
    return u
