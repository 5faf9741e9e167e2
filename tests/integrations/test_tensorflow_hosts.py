"""A tf.GradientTape loop that is watched ends bit by bit as one that is not."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import lnp
from integrations.determinism import deterministic

GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.standard_normal((48, 6)).astype(np.float32)
TARGETS = GENERATOR.integers(3, size=48)
fixed_order = pytest.fixture(autouse=True, scope="module")(deterministic)


class Network(tf.Module):
    """With dropout from the global generator, and running statistics that a pass writes."""

    def __init__(self):
        super().__init__()
        normal = tf.random.Generator.from_seed(0).normal
        self.hidden, self.head = tf.Variable(normal((6, 8)) / 3), tf.Variable(normal((8, 3)) / 3)
        self.seen = tf.Variable(tf.zeros(8), trainable=False)

    def __call__(self, x):
        hidden = tf.tanh(x @ self.hidden)
        self.seen.assign(0.9 * self.seen + 0.1 * tf.reduce_mean(hidden, 0))
        return tf.nn.dropout(hidden, 0.3) @ self.head


def train(tracker=None, accumulate=1, half=False):
    tf.random.set_seed(1)
    np.random.seed(2)  # noqa: NPY002
    model = Network()
    momentum = [tf.Variable(tf.zeros_like(v)) for v in model.trainable_variables]

    @tf.function
    def gradients(x, y):
        with tf.GradientTape() as tape:
            logits = model(x)
            logits = tf.cast(tf.cast(logits, tf.bfloat16), tf.float32) if half else logits
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))
        return loss, tape.gradient(loss, model.trainable_variables)

    losses, total = [], [tf.zeros_like(v) for v in momentum]
    for index in range(6):
        x, y = INPUTS[8 * index : 8 * index + 8], TARGETS[8 * index : 8 * index + 8]
        if tracker is not None:
            tracker.observe(index // accumulate, model, (tf.constant(x), tf.constant(y)))
        loss, found = gradients(x, y)
        losses.append(float(loss))
        total = [t + g for t, g in zip(total, found, strict=True)]
        if (index + 1) % accumulate == 0:
            for v, m, g in zip(model.trainable_variables, momentum, total, strict=True):
                m.assign(0.9 * m + g)
                v.assign_sub(0.1 * m)
            total = [tf.zeros_like(v) for v in momentum]
    ends = [v.numpy() for v in (*model.variables, *momentum)]
    return losses, ends, tf.random.uniform(()).numpy(), repr(np.random.get_state())  # noqa: NPY002


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"half": True}], ids=str)
def test_a_loop_is_not_changed(options):
    tracker = lnp.Tracker(schedule=1, max_probes=2)
    watched, plain = train(tracker, **options), train(**options)
    assert watched[0] == plain[0]
    assert all(map(np.array_equal, watched[1], plain[1]))
    assert watched[2:] == plain[2:]
    assert len(tracker.history) == 6 // options.get("accumulate", 1)
