"""Spectrum, kernel and operators of TensorFlow models against dense Jacobians."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import lnp
from contract.namespaces import tensorflow
from integrations.spectral_reference import check

tensorflow()


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def mlp(p, x):
    return tf.tanh(x @ p["w"]) @ p["a"] + p["b"]


def coupled(p, x):
    out = mlp(p, x)
    return out - tf.reduce_mean(out, 0)


def looped(p, x):
    """In a `tf.while_loop`."""
    step = lambda t, h: (t + 1, tf.tanh(h @ p["u"] + x @ p["w"]))
    h = tf.while_loop(lambda t, h: t < 3, step, (0, tf.zeros((x.shape[0], 16), x.dtype)))[1]
    return h @ p["a"] + p["b"]


WEIGHTS = {"w": normal(5, 16) / 2, "a": normal(16, 4, seed=1) / 4, "b": normal(4, seed=2), "u": normal(16, 16) / 4}
X, Y = normal(6, 5, seed=3), np.arange(6) % 4


def dense(function, variables, loss):
    """(J, g)."""
    with tf.GradientTape(persistent=True) as tape:
        out = function()
        rows = tf.unstack(tf.reshape(out, (-1,)))
    with tf.GradientTape() as of_loss:
        of_loss.watch(out)
        value = loss(out)
    grads = [tape.gradient(row, variables, unconnected_gradients="zero") for row in rows]
    j = np.array([np.concatenate([tf.reshape(part, (-1,)).numpy() for part in row]) for row in grads])
    return j, of_loss.gradient(value, out).numpy()


def parameters(function, dtype):
    return {name: tf.Variable(w.astype(dtype)) for name, w in WEIGHTS.items() if name != "u" or function is looped}


@pytest.mark.parametrize(
    ("function", "dtype"), [(mlp, "float32"), (mlp, "float64"), (coupled, "float64"), (looped, "float64")]
)
def test_functions(function, dtype):
    p = parameters(function, dtype)
    x, y = tf.constant(X.astype(dtype)), tf.constant(Y)
    loss = lambda out: tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, out))
    check((function, p), (x, y), None, *dense(lambda: function(p, x), list(p.values()), loss), dtype)
    assert all(np.array_equal(p[name].numpy(), WEIGHTS[name].astype(dtype)) for name in p)


def test_a_second_measurement_traces_nothing():
    calls = []

    def counted(p, x):
        calls.append(1)
        return mlp(p, x)

    p, batch = parameters(mlp, "float32"), (tf.constant(X.astype("float32")), tf.constant(Y))
    settings = {"probes": 2, "steps": 5, "estimator": "exact"}
    first = lnp.spectrum((counted, p), batch, **settings)
    calls.clear()
    p["w"].assign_add(tf.ones_like(p["w"]) / 10)
    again = lnp.spectrum((counted, p), batch, seed=1, **settings)
    assert calls == []
    assert again.first_moment != first.first_moment
    assert not np.array_equal(again.density.nodes, first.density.nodes)


def test_what_cannot_be_differentiated_twice_is_refused_in_a_sentence():
    w = tf.Variable(WEIGHTS["w"])
    run = lambda x: tf.recompute_grad(lambda x: tf.tanh(x @ w))(x)
    for measure in (lnp.spectrum, lnp.kernel):
        with pytest.raises(ValueError, match="cannot be differentiated itself"):
            measure((run, [w]), (tf.constant(X), tf.constant(Y)))
