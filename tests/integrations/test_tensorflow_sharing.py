"""The gradient that a training step needs, by the pass that is measured anyway."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import lnp
import lnp_tensorflow
from contract.namespaces import tensorflow
from integrations.test_tensorflow_models import Stateful, normal, squared, tokens

tensorflow()


class Net(tf.Module):
    """Its trainable variables in TensorFlow's order are not in the order of its attributes."""

    def __init__(self):
        super().__init__()
        self.z, self.scale = tf.Variable(normal(7, 3)), tf.Variable(0.5, dtype=tf.float64)
        self.a, self.frozen = tf.Variable(normal(3, 4)), tf.Variable(normal(4), trainable=False)

    def __call__(self, ids):
        return tf.tanh(tf.reduce_sum(tf.gather(self.z, ids), 1)) @ self.a * self.scale + self.frozen


def tape(model, x, y, variables):
    with tf.GradientTape() as recorded:
        recorded.watch(variables)
        loss = squared(y)(model(x))
    return loss, [tf.convert_to_tensor(g) for g in recorded.gradient(loss, variables)]


def equal(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert np.allclose(ours, theirs, rtol=1e-12, atol=1e-14)
        assert ours.shape == theirs.shape


@pytest.mark.parametrize("microbatch", [None, 2])
def test_of_a_module(microbatch):
    model, x, y = Net(), tf.constant(tokens(5, 2)), tf.constant(normal(5, 4, seed=1))
    (loss, d), gradients = lnp_tensorflow.value_and_grad(model, (x, y), microbatch=microbatch)
    expected, theirs = tape(model, x, y, model.trainable_variables)
    assert loss == d.loss == pytest.approx(float(expected), rel=1e-12)
    equal(gradients, theirs)
    assert d.rate == pytest.approx(sum(float(tf.reduce_sum(g**2)) for g in theirs), rel=1e-12)
    assert d == lnp.decompose(model, (x, y), microbatch=microbatch)


def test_of_some_parameters():
    model, x, y = Net(), tf.constant(tokens(5, 2)), tf.constant(normal(5, 4, seed=1))
    _, gradients = lnp_tensorflow.value_and_grad(model, (x, y), parameters=["z", "frozen"])
    equal(gradients, tape(model, x, y, [model.z, model.frozen])[1])


def test_an_optimizer_takes_them_inside_a_function():
    model, x, y = Net(), tf.constant(tokens(5, 2)), tf.constant(normal(5, 4, seed=1))

    @tf.function
    def step(x, y):
        (loss, d), gradients = lnp_tensorflow.value_and_grad(model, (x, y))
        for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
            variable.assign_sub(0.01 * gradient)
        return loss, d.chi_pos

    expected, theirs = tape(model, x, y, model.trainable_variables)
    moved = [v - 0.01 * g for v, g in zip(model.trainable_variables, theirs, strict=True)]
    loss, position = step(x, y)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert 0 < float(position) < 1
    equal([v.read_value() for v in model.trainable_variables], moved)


def test_of_functions():
    """In the structure of their parameters."""
    x, y = tf.constant(normal(5, 3)), tf.constant(normal(5, 2, seed=1))
    p = {"w": [tf.constant(normal(3, 2))], "steps": tf.range(3)}
    _, found = lnp_tensorflow.value_and_grad((lambda p, x: tf.tanh(x @ p["w"][0]), p), (x, y))
    v = tf.Variable(p["w"][0])
    expected = tape(lambda x: tf.tanh(x @ v), x, y, [v])[1]
    assert found["steps"] is None
    equal(found["w"], expected)
    equal(lnp_tensorflow.value_and_grad((lambda x: tf.tanh(x @ v), [v]), (x, y))[1], expected)


def test_through_batch_statistics():
    model, x, y = Stateful(), tf.constant(normal(6, 4)), tf.constant(normal(6, 3, seed=1))
    (_, d), gradients = lnp_tensorflow.value_and_grad(model, (x, y))
    before = model.mean.numpy()
    assert d.estimator == "joint"
    equal(gradients, tape(model, x, y, [model.w])[1])
    assert not np.array_equal(model.mean.numpy(), before)  # by the tape's pass alone


def test_errors_are_those_of_decompose():
    model, x = Net(), tf.constant(tokens(5, 2))
    with pytest.raises(TypeError, match="lnp_keras"):
        lnp_tensorflow.value_and_grad(object(), (x, x))
    with pytest.raises(ValueError, match="Expected one of"):
        lnp_tensorflow.value_and_grad(model, (x, x), estimator="other")
    assert isinstance(lnp.decompose(model, (x, tf.constant(normal(5, 4)))), lnp.Decomposition)  # nothing is left behind
