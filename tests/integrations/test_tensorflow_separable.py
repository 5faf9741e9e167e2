"""Losses of the user's own: population values where they are a mean over samples, and only there."""

from __future__ import annotations

import pytest
import tensorflow as tf

import lnp
from lnp_tensorflow.losses import is_mean_over_samples

SAMPLES, CLASSES = 24, 4
cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits


def contrastive(o, t):
    normal = tf.math.l2_normalize(o, axis=1)
    similar = tf.matmul(normal, tf.roll(normal, 1, 0), transpose_b=True) / 0.5
    return tf.reduce_mean(cross_entropy(tf.range(o.shape[0]), similar))


MEANS = {
    "cross-entropy": lambda o, t: tf.reduce_mean(cross_entropy(t, o)),
    "of probabilities": lambda o, t: -tf.reduce_mean(tf.math.log(tf.gather(o, t, batch_dims=1))),
}
OTHERS = {
    "sum": lambda o, t: tf.reduce_sum(cross_entropy(t, o)),
    "logarithm": lambda o, t: tf.math.log(tf.reduce_mean(cross_entropy(t, o))),
    "batch statistics": lambda o, t: tf.reduce_mean(cross_entropy(t, o - tf.reduce_mean(o, 0))),
    "gated": lambda o, t: (
        tf.reduce_mean(cross_entropy(t, o)) + tf.reduce_mean(tf.reduce_sum(tf.nn.relu(o - 1), 0) ** 2)
    ),
    "whole batches": lambda o, t: tf.reduce_mean(cross_entropy(t, tf.reshape(o, (SAMPLES, CLASSES)))),
    "contrastive": contrastive,
}


def made():
    tf.random.set_seed(0)
    hidden, head = tf.Variable(tf.random.normal((5, 8))), tf.Variable(tf.random.uniform((8, CLASSES)))
    model = (lambda x: tf.sigmoid(x @ hidden) @ head, [hidden, head])
    return model, (tf.random.normal((SAMPLES, 5)), tf.range(SAMPLES) * 5 % 7 % CLASSES)


@pytest.mark.parametrize("name", [*MEANS, *OTHERS])
def test_by_the_loss_gradient_of_some_samples(name):
    (function, _), (x, y) = made()
    assert is_mean_over_samples({**MEANS, **OTHERS}[name], function(x), y) is (name in MEANS)


def test_several_outputs_and_targets():
    outputs = {"a": tf.ones((9, 2)), "b": tf.ones((9, 3))}
    targets = (tf.ones((9, 2)), tf.ones((9,), tf.bool))
    mean = lambda o, t: tf.reduce_mean((o["a"] - t[0]) ** 2) + tf.reduce_mean(tf.where(t[1][:, None], o["b"] ** 2, 0.0))
    assert is_mean_over_samples(mean, outputs, targets)
    assert not is_mean_over_samples(lambda o, t: mean(o, t) + tf.reduce_mean(o["b"]) ** 2, outputs, targets)
    assert not is_mean_over_samples(mean, outputs, (targets[0], tf.ones((4,), tf.bool)))


def test_population_values(caplog):
    model, batch = made()
    assert lnp.decompose(model, batch, MEANS["cross-entropy"], rtol=0.1).population is not None
    d = lnp.decompose(model, batch, contrastive, rtol=0.1)
    assert d.population is None
    assert any("whether the loss is a mean over samples" in note for note in d.notes)
    assert not caplog.records  # no warning of retracing


def padded(o, t):
    kept = tf.cast(t >= 0, o.dtype)
    return tf.reduce_sum(kept * cross_entropy(tf.maximum(t, 0), o)) / tf.reduce_sum(kept)


@pytest.mark.parametrize("first", [True, False])
def test_the_padding_of_the_first_batch_decides_nothing(first):
    """What counts are shapes: two batches of one shape get one answer, in either order."""
    model, (x, y) = made()
    targets = [tf.where(tf.range(SAMPLES) % 3 == 0, -1, y), y]
    found = [lnp.decompose(model, (x, t), padded, rtol=0.1) for t in (targets if first else targets[::-1])]
    assert all(d.population is not None for d in found)
