"""Gram matrices and two losses in TensorFlow: what is asked for inside of a `tf.function`."""

from __future__ import annotations

import pytest
import tensorflow as tf

import lnp

WEIGHT = tf.Variable(tf.ones((3, 2)))
MODEL = lambda x: x @ WEIGHT, [WEIGHT]
BATCH = tf.reshape(tf.range(12.0), (4, 3)), tf.ones((4, 2))


@pytest.mark.parametrize(
    "measure",
    [
        lambda: lnp.gradient_gram(MODEL, [BATCH, BATCH], "mse").matrix,
        lambda: lnp.cross_response(MODEL, BATCH, BATCH, "mse", measured_loss="huber").rate,
    ],
)
def test_gradients_are_not_held_inside_of_a_function(measure):
    with pytest.raises(TypeError, match=r"inside of a compiled function\. Expected a call outside of one"):
        tf.function(measure, autograph=False)()
