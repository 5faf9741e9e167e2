"""What the decomposition must be, from a dense Jacobian by `tf.GradientTape`, one row at a time."""

from __future__ import annotations

import numpy as np
import tensorflow as tf


def dense(run, variables, loss, loss_terms):
    """The factors of loss(run()), where the outputs of run() are (N, ...) and depend on the variables."""
    with tf.GradientTape(persistent=True) as tape:
        outputs = run()
        rows = tf.unstack(tf.reshape(outputs, (-1,)))
    with tf.GradientTape() as of_loss:
        of_loss.watch(outputs)
        value = loss(outputs)
    g = of_loss.gradient(value, outputs).numpy().astype(float).ravel()
    j = np.array([[*_flat(tape.gradient(row, variables, unconnected_gradients="zero"))] for row in rows])
    kernel = j @ j.T
    rate, g2, trace = g @ kernel @ g, g @ g, np.trace(kernel)
    return {
        "loss": float(value),
        "rate": rate,
        "chi_loss": loss_terms * g2,
        "chi_net": trace / loss_terms,
        "chi_pos": rate / (g2 * trace),
    }


def _flat(gradients):
    return np.concatenate([tf.convert_to_tensor(g).numpy().astype(float).ravel() for g in gradients])
