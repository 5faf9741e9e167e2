"""Losses in TensorFlow, and the number of terms they average."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

from lnp.contract.trees import leaves, map_leaves
from lnp.losses import kinds
from lnp.losses.mean_test import Leaf, found_mean
from lnp_tensorflow import array_namespace as xp
from lnp_tensorflow.fallback import FATAL
from lnp_tensorflow.outputs import flatten, measured, parts, rebuild
from lnp_tensorflow.state_guard import undisturbed
from lnp_tensorflow.strategies import as_one_replica


def in_order(loss: Any) -> Any:
    """A loss of Keras, which takes (targets, outputs), as a loss(outputs, targets); any other as it is."""
    keras = sys.modules.get("keras")
    if keras is None or not callable(loss):
        return loss
    if not (isinstance(loss, keras.losses.Loss) or str(getattr(loss, "__module__", "")).startswith("keras.")):
        return loss
    from lnp_keras.losses import adapted  # which needs Keras

    return adapted(loss)


def prepare(loss: str | Callable | None, outputs: Any, targets: Any, loss_terms: Any) -> kinds.Prepared:
    """The loss(outputs, targets) -> scalar that is meant, where outputs may be of any structure."""
    shape, aims = (tuple(leaf.shape) if tf.is_tensor(leaf) else None for leaf in (outputs, targets))
    integer = shape is not None and aims is not None and targets.dtype.is_integer
    first = tuple(parts(outputs)[0].shape) if shape is None else shape
    prepared = kinds.prepare(
        xp,
        loss,
        kinds.Given(shape, aims, integer, first),
        (outputs, targets),
        elementwise=ELEMENTWISE,
        cross_entropy=lambda axis, labels: _cross_entropy if labels else _soft_cross_entropy,
        loss_terms=loss_terms,
    )
    return replace(prepared, function=as_one_replica()(prepared.function))


def is_mean_over_samples(function: Callable, outputs: Any, targets: Any) -> bool:
    """Whether a loss is a mean over samples, as far as leaving samples out shows, on stand-ins for its arguments."""
    for leaf in (*leaves(outputs), *leaves(targets)):
        if not (isinstance(leaf, tf.Tensor) and leaf.shape.rank is not None and leaf.dtype.is_numpy_compatible):
            return False

    def gradient(outputs_drawn: Sequence[np.ndarray], targets_drawn: Sequence[np.ndarray]) -> tf.Tensor:
        """The loss gradient (M, K), in a graph of its own: no tape records where graphs that are traced are left."""
        filled, aims = (iter(map(tf.constant, drawn)) for drawn in (outputs_drawn, targets_drawn))
        whole, aim = map_leaves(lambda _: next(filled), outputs), map_leaves(lambda _: next(aims), targets)

        def run() -> tf.Tensor:
            floating = [tf.identity(part) for part in parts(whole)]
            value = function(rebuild(whole, floating), aim)
            return flatten(tf.gradients(value, floating, unconnected_gradients=tf.UnconnectedGradients.ZERO))

        return tf.function(run, autograph=False).get_concrete_function()()  # which is no retracing to be warned of

    with tf.init_scope():
        return found_mean(xp, gradient, [_leaf(x) for x in leaves(outputs)], [_leaf(x) for x in leaves(targets)], FATAL)


def alone(function: Callable, loss: Any, outputs: Any, targets: Any, dtype: tf.DType) -> tf.Tensor:
    """(N,) the loss of each sample by itself, or nan where it takes no single samples, whatever it raises.

    `loss` is what the user passed, which a call may write to.
    """
    samples = parts(outputs)[0].shape[0]

    def one(n: tf.Tensor) -> tf.Tensor:
        def row(leaf: Any) -> Any:
            over = tf.is_tensor(leaf) and leaf.shape.rank and leaf.shape[0] == samples
            return leaf[n : n + 1] if over else leaf

        return tf.cast(tf.reshape(function(map_leaves(row, outputs), map_leaves(row, targets)), ()), dtype)

    try:
        with undisturbed(loss):
            return tf.map_fn(one, tf.range(samples), fn_output_signature=dtype)
    except FATAL:
        raise
    except Exception:
        return tf.fill((samples,), tf.constant(float("nan"), dtype))


def _leaf(tensor: tf.Tensor) -> Leaf:
    return Leaf(tuple(tensor.shape), np.dtype(tensor.dtype.as_numpy_dtype).name, measured(tensor))


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
