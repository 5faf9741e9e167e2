"""Net rates of a TensorFlow loop, single samples' losses, and measuring at averaged variables."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import lnp

R = np.random.default_rng(0)
X, Y = tf.constant(R.standard_normal((12, 4)), tf.float32), tf.constant(R.integers(0, 3, 12))


def loss(logits, labels):
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))


def run(watched):
    w = tf.Variable(tf.zeros((4, 3)))
    ema = tf.train.ExponentialMovingAverage(0.5)
    ema.apply([w])
    mean = tf.Variable(w)  # the averages themselves are not trainable
    tracker = lnp.Tracker(schedule=2, batch=(X, Y), learning_rate=0.1, on_error="raise")
    at_average = []
    for step in range(3):
        at_average.append(float(loss(X @ ema.average(w), Y)))
        if watched:
            mean.assign(ema.average(w))
            tracker.observe(step, (lambda x: x @ mean, [mean]))
        with tf.GradientTape() as tape:
            value = loss(X[:6] @ w, Y[:6])
        w.assign_sub(0.1 * tape.gradient(value, w))
        ema.apply([w])
    return w.numpy(), ema.average(w).numpy(), at_average, tracker


def test_averaged_variables_are_measured_and_nothing_moves():
    *weights, at_average, tracker = run(watched=True)
    assert all(map(np.array_equal, weights, run(watched=False)[:2]))
    first, second = tracker.history.rows()
    assert second["net/rate"] == pytest.approx((first["loss"] - second["loss"]) / 0.2, rel=1e-4)
    assert second["net/rate_stderr"] > 0
    assert [first["loss"], second["loss"]] == pytest.approx([np.log(3), at_average[-1]], rel=1e-5)


@pytest.mark.parametrize(
    ("function", "sums"),
    [(None, True), (loss, True), (lambda f, y: tf.math.reduce_variance(f), False)],
    ids=["inferred", "own", "none"],
)
def test_each_sample_s_part_of_the_loss(function, sums):
    w = tf.Variable(tf.constant(R.standard_normal((4, 3)), tf.float32))
    d = lnp.decompose((lambda x: x @ w, [w]), (X, Y), function, sample_losses=True)
    found = np.asarray(d.sample_losses.parts)
    single = tf.nn.sparse_softmax_cross_entropy_with_logits(Y, X @ w).numpy() / 12
    assert np.allclose(found, single, rtol=1e-5) if sums else np.isnan(found).all()
