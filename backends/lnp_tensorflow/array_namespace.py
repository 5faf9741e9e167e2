"""The array functions that lnp's core uses, with the array-API standard's names and meaning, over TensorFlow's.

TensorFlow is no array-API library, and `enable_numpy_behavior` changes the whole process. `device` is taken and not
used: TensorFlow places an operation where its operands are.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorflow as tf
from ml_dtypes import finfo as _finfo

float32, float64, int32, bool = tf.float32, tf.float64, tf.int32, tf.bool


def asarray(value: Any, *, dtype: Any = None, device: Any = None) -> tf.Tensor:
    """A tensor; a value of another dtype is converted."""
    if dtype is not None and not tf.is_tensor(value):
        value = np.asarray(value)  # Python's numbers would be rounded to float32 on the way
    tensor = tf.convert_to_tensor(value)
    return tensor if dtype is None else tf.cast(tensor, dtype)


def astype(x: tf.Tensor, dtype: Any, *, copy: builtins.bool = True) -> tf.Tensor:
    """Tensors cannot be written to, so that there is nothing to copy."""
    return x if x.dtype == dtype else tf.cast(x, dtype)


def finfo(dtype: Any) -> Any:
    """Limits of a floating-point type, bfloat16 too."""
    return _finfo(tf.as_dtype(dtype).as_numpy_dtype)


def zeros(shape: Any, *, dtype: Any = tf.float32, device: Any = None) -> tf.Tensor:
    """Shape () is written as a tuple, too."""
    return tf.zeros(shape, dtype)


def zeros_like(x: tf.Tensor, *, dtype: Any = None) -> tf.Tensor:
    return tf.zeros_like(x, dtype)


def ones_like(x: tf.Tensor) -> tf.Tensor:
    return tf.ones_like(x)


def full_like(x: tf.Tensor, value: float) -> tf.Tensor:
    return tf.constant(value, x.dtype, x.shape)


def full(shape: Sequence[int], value: float, *, dtype: Any = tf.float32, device: Any = None) -> tf.Tensor:
    return tf.constant(value, dtype, shape)


def arange(stop: int, *, device: Any = None) -> tf.Tensor:
    return tf.range(stop)


def reshape(x: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    return tf.reshape(x, shape)


def broadcast_to(x: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    return tf.broadcast_to(x, shape)


def concat(arrays: Sequence[tf.Tensor], *, axis: int = 0) -> tf.Tensor:
    return tf.concat(_promoted(arrays), axis)


def stack(arrays: Sequence[tf.Tensor], *, axis: int = 0) -> tf.Tensor:
    return tf.stack(_promoted(arrays), axis)


def _promoted(arrays: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """All in the widest of their dtypes, which the standard's functions choose by themselves."""
    widest = builtins.max((x.dtype for x in arrays), key=lambda dtype: (dtype.is_floating, dtype.size))
    return [astype(x, widest) for x in arrays]


def where(condition: tf.Tensor, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    return tf.where(condition, x, y)


def sqrt(x: tf.Tensor) -> tf.Tensor:
    return tf.sqrt(x)


def sin(x: tf.Tensor) -> tf.Tensor:
    return tf.sin(x)


def floor(x: tf.Tensor) -> tf.Tensor:
    return tf.floor(x)


def log2(x: tf.Tensor) -> tf.Tensor:
    return tf.math.log(x) / math.log(2.0)


def clip(x: tf.Tensor, low: float, high: float) -> tf.Tensor:
    return tf.clip_by_value(x, tf.cast(low, x.dtype), tf.cast(high, x.dtype))


def abs(x: tf.Tensor) -> tf.Tensor:
    return tf.abs(x)


def max(x: tf.Tensor) -> tf.Tensor:
    """Of all elements; nan if one of them is, which XLA would leave out."""
    return tf.where(tf.reduce_any(tf.math.is_nan(x)), tf.constant(float("nan"), x.dtype), tf.reduce_max(x))


def maximum(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """Element by element; nan where one of them is, which XLA would leave out."""
    x, y = _promoted([x, y])
    return tf.where(tf.math.is_nan(x), x, tf.where(tf.math.is_nan(y), y, tf.maximum(x, y)))


def sum(x: tf.Tensor, *, axis: int | tuple[int, ...] | None = None, keepdims: builtins.bool = False) -> tf.Tensor:
    return tf.reduce_sum(x, axis, keepdims)


def mean(x: tf.Tensor, *, axis: int | None = None, keepdims: builtins.bool = False) -> tf.Tensor:
    return tf.reduce_mean(x, axis, keepdims)


def any(x: tf.Tensor) -> tf.Tensor:
    return tf.reduce_any(x)


def logical_not(x: tf.Tensor) -> tf.Tensor:
    return tf.logical_not(x)


def searchsorted(x1: tf.Tensor, x2: tf.Tensor) -> tf.Tensor:
    return tf.searchsorted(x1, x2)


def sort(x: tf.Tensor) -> tf.Tensor:
    return tf.sort(x)


def argsort(x: tf.Tensor) -> tf.Tensor:
    return tf.argsort(x)


def bitwise_right_shift(x: tf.Tensor, bits: int) -> tf.Tensor:
    return tf.bitwise.right_shift(x, tf.constant(bits, x.dtype))


def take(x: tf.Tensor, indices: tf.Tensor, *, axis: int) -> tf.Tensor:
    return tf.gather(x, indices, axis=axis)


def take_along_axis(x: tf.Tensor, indices: tf.Tensor, *, axis: int) -> tf.Tensor:
    """Of equal shapes but for this axis."""
    axis %= len(x.shape)
    if axis != len(x.shape) - 1:
        order = [i for i in range(len(x.shape)) if i != axis] + [axis]
        back = [order.index(i) for i in range(len(order))]
        moved = take_along_axis(tf.transpose(x, order), tf.transpose(indices, order), axis=-1)
        return tf.transpose(moved, back)
    return tf.gather(x, indices, axis=-1, batch_dims=axis)


def matmul(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    if len(y.shape) == 2 < len(x.shape):  # oneDNN of TensorFlow 2.21 corrupts memory where it broadcasts one matrix
        return tf.reshape(tf.matmul(tf.reshape(x, (-1, x.shape[-1])), y), (*x.shape[:-1], y.shape[-1]))
    return tf.matmul(x, y)


def matrix_transpose(x: tf.Tensor) -> tf.Tensor:
    return tf.linalg.matrix_transpose(x)


def _vector_norm(x: tf.Tensor, *, axis: int) -> tf.Tensor:
    return tf.sqrt(tf.reduce_sum(tf.square(x), axis))


linalg = SimpleNamespace(vector_norm=_vector_norm)
