"""The core's random signs, inside graphs too."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from lnp.estimators.signs import Signs, layout
from lnp_tensorflow import array_namespace


def signs_of(seed: Any, flat: tf.Tensor, parts: list[tf.Tensor]) -> Signs:
    """The signs for outputs (N, K), which were these parts. The seed is a number or a tensor of shape ()."""
    words = tf.reverse(tf.bitcast(tf.cast(seed, tf.int64), tf.int32), [0])  # the higher one first
    shapes = [(part.shape[0], *(part.shape[1:] or ())) for part in parts]
    return Signs(array_namespace, words, (flat.shape[0], math.prod(flat.shape[1:])), *layout(shapes), flat.dtype)
