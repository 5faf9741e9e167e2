"""Losses in TensorFlow, and the number of terms they average."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from lnp.losses import kinds
from lnp_tensorflow import array_namespace as xp
from lnp_tensorflow.outputs import parts


def prepare(
    loss: str | Callable | None, outputs: Any, targets: Any, given: Any
) -> tuple[Callable, Any, tuple, tuple[str, ...]]:
    """(loss(outputs, targets) -> scalar, loss_terms, violations, notes), where outputs may be of any structure."""
    single = tf.is_tensor(outputs) and tf.is_tensor(targets)
    shape = tuple(outputs.shape) if single else ()
    integer = single and targets.dtype.is_integer
    meant = kinds.resolve(loss, shape, tuple(targets.shape) if single else None, integer)
    if isinstance(meant, str) and not single:
        kinds.resolve(None, (), None, False)  # a named loss needs single tensors just as much
    if meant in kinds.ELEMENTWISE:
        kinds.check_same_shape(shape, tuple(targets.shape))
        return ELEMENTWISE[meant], math.prod(shape) if given is None else given, (), ()
    if meant == "cross_entropy":
        kinds.class_axis(shape, tuple(targets.shape), integer)
        if not integer:
            return _soft_cross_entropy, math.prod(shape[:-1]) if given is None else given, (), ()
        terms = kinds.label_terms(xp, targets) if given is None else given
        return _cross_entropy, terms, (kinds.labels_out_of_range(xp, targets, shape[-1]),), ()
    assert callable(meant)
    if given is not None:
        return meant, given, (), ()
    stated = kinds.stated_terms(meant, outputs, targets)
    if stated is not None:
        return meant, stated[0], (), stated[1]
    leaf = outputs if tf.is_tensor(outputs) else parts(outputs)[0]
    terms, note = kinds.assumed_terms(xp, tuple(leaf.shape), targets if single else None, integer)
    return meant, terms, (), (note,)


def _mse(outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    return tf.reduce_mean((outputs - tf.cast(targets, outputs.dtype)) ** 2)


def _huber(outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    distance = tf.abs(outputs - tf.cast(targets, outputs.dtype))
    return tf.reduce_mean(tf.where(distance < 1, 0.5 * distance**2, distance - 0.5))


def _binary_cross_entropy(outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(tf.cast(targets, outputs.dtype), outputs))


ELEMENTWISE = {"mse": _mse, "huber": _huber, "binary_cross_entropy": _binary_cross_entropy}


def _soft_cross_entropy(outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    picked = tf.cast(targets, outputs.dtype) * tf.nn.log_softmax(outputs)
    return -tf.reduce_mean(tf.reduce_sum(picked, axis=-1))


def _cross_entropy(outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """The mean over labels that are not ignored; labels out of range are taken in, and reported as violations."""
    kept = tf.cast(targets != kinds.IGNORE_INDEX, outputs.dtype)
    labels = tf.clip_by_value(tf.cast(targets, tf.int32), 0, outputs.shape[-1] - 1)
    picked = tf.gather(tf.nn.log_softmax(outputs), labels, axis=-1, batch_dims=len(labels.shape))
    return -tf.reduce_sum(kept * picked) / tf.reduce_sum(kept)
