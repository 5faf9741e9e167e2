"""Whether a loss of the user's own is a mean over samples: found out while tracing, on stand-ins for its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from lnp.contract.trees import leaves, map_leaves
from lnp.losses import mean_test
from lnp.losses.kinds import TRIED, agrees, all_agree
from lnp_tensorflow import array_namespace as xp
from lnp_tensorflow.outputs import flatten, measured, parts, rebuild


def found_separable(function: Callable, outputs: Any, targets: Any) -> bool:
    """Whether the loss gradient of M samples alone is that among N, times N / M.

    Only the shapes and dtypes of a batch's `outputs` and `targets` are looked at. A loss that cannot be called with a
    part of them, or by itself while its caller is traced, is none.
    """
    samples = parts(outputs)[0].shape[0]
    given = [*leaves(outputs), *leaves(targets)]
    if any(not tf.is_tensor(leaf) or (leaf.shape.rank and leaf.shape[0] != samples) for leaf in given):
        return False
    try:
        with tf.init_scope():
            draws = range(mean_test.DRAWS)
            return all_agree([_agrees(function, *_stand_ins(outputs, targets, draw)) for draw in draws])
    except Exception:  # whatever the user's loss raises for a part of its batch
        return False


def _stand_ins(outputs: Any, targets: Any, draw: int) -> tuple[Any, Any]:
    """Those for a few samples."""
    classes = mean_test.classes([tuple(leaf.shape) for leaf in parts(outputs)])
    output = lambda leaf: tf.constant(mean_test.outputs(_few(leaf), leaf.dtype.as_numpy_dtype, draw))
    target = lambda leaf: tf.constant(mean_test.targets(_few(leaf), leaf.dtype.as_numpy_dtype, classes, draw))
    made = map_leaves(lambda leaf: output(leaf) if measured(leaf) else target(leaf), outputs)
    return made, map_leaves(target, targets)


def _few(leaf: tf.Tensor) -> tuple[int, ...]:
    return (min(leaf.shape[0], TRIED), *leaf.shape[1:]) if leaf.shape.rank else ()


def _agrees(function: Callable, outputs: Any, targets: Any) -> bool | None:
    whole = _gradient(function, outputs, targets)

    def alone(some: list[int]) -> tuple[tf.Tensor, tf.Tensor]:
        rows = lambda leaf: tf.gather(leaf, some) if leaf.shape.rank else leaf
        return tf.gather(whole, some), _gradient(function, map_leaves(rows, outputs), map_leaves(rows, targets))

    return agrees(xp, whole, alone)


def _gradient(function: Callable, outputs: Any, targets: Any) -> tf.Tensor:
    """In a graph of its own, without a tape: none records where graphs that are being traced are left for a while."""

    def run() -> tf.Tensor:
        floating = [tf.identity(part) for part in parts(outputs)]
        value = function(rebuild(outputs, floating), targets)
        return flatten(tf.gradients(value, floating, unconnected_gradients=tf.UnconnectedGradients.ZERO))

    return tf.function(run, autograph=False).get_concrete_function()()  # which is no retracing to be warned of
