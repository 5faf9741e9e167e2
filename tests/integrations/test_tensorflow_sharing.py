"""Loss and gradients of a step that is measured: bit for bit those of `tf.GradientTape`."""

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
        self.unused = tf.Variable(normal(2))

    def __call__(self, ids):
        return tf.tanh(tf.reduce_sum(tf.gather(self.z, ids), 1)) @ self.a * self.scale + self.frozen


def mean_square(outputs, targets):
    return squared(targets)(outputs)


def tape(model, x, y, variables):
    with tf.GradientTape() as recorded:
        recorded.watch(variables)
        loss = mean_square(model(x), y)
    return loss, recorded.gradient(loss, variables)


def equal(found, expected):
    """The same bits, in the same kind of tensor: the used rows of an embedding, or nothing, stay what they are."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert type(ours) is type(theirs)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            assert np.array_equal(*map(tf.convert_to_tensor, (ours, theirs)))


@pytest.mark.parametrize("microbatch", [None, 2])
def test_of_a_module(microbatch):
    model, x, y = Net(), tf.constant(tokens(5, 2)), tf.constant(normal(5, 4, seed=1))
    (loss, d), gradients = lnp_tensorflow.value_and_grad(model, (x, y), mean_square, microbatch=microbatch)
    expected, theirs = tape(model, x, y, model.trainable_variables)
    equal([loss, *gradients], [expected, *theirs])
    assert any(g is None for g in gradients)
    assert any(isinstance(g, tf.IndexedSlices) for g in gradients)
    dense = [tf.convert_to_tensor(g) for g in theirs if g is not None]
    assert d.rate == pytest.approx(sum(float(tf.reduce_sum(g**2)) for g in dense), rel=1e-12)
    assert d == lnp.decompose(model, (x, y), mean_square, microbatch=microbatch)


def test_of_some_parameters():
    model, x, y = Net(), tf.constant(tokens(5, 2)), tf.constant(normal(5, 4, seed=1))
    _, gradients = lnp_tensorflow.value_and_grad(model, (x, y), mean_square, parameters=["z", "frozen"])
    equal(gradients, tape(model, x, y, [model.z, model.frozen])[1])


def test_losses_by_name():
    model, x, y = Net(), tf.constant(tokens(5, 2)), normal(5, 4, seed=1)
    (loss, d), gradients = lnp_tensorflow.value_and_grad(model, (x, y))
    expected, theirs = tape(model, x, y, model.trainable_variables)
    equal([loss, *gradients], [expected, *theirs])
    assert d.loss == pytest.approx(float(loss), rel=1e-12)


def test_inside_a_function():
    """The traced step is that of a function that does not measure."""
    x, y = tf.constant(tokens(5, 2)), tf.constant(normal(5, 4, seed=1))

    def step(watched):
        model = Net()
        optimizer = [tf.Variable(tf.zeros_like(v)) for v in model.trainable_variables]

        @tf.function
        def run(x, y):
            if watched:
                (loss, d), gradients = lnp_tensorflow.value_and_grad(model, (x, y), mean_square)
            else:
                (loss, gradients), d = tape(model, x, y, model.trainable_variables), None
            for variable, momentum, gradient in zip(model.trainable_variables, optimizer, gradients, strict=True):
                if gradient is not None:
                    momentum.assign(0.9 * momentum + tf.convert_to_tensor(gradient))
                    variable.assign_sub(0.1 * momentum)
            return loss, tf.constant(0.5) if d is None else d.chi_pos

        made = [run(x, y) for _ in range(3)]
        assert all(0 < float(position) < 1 for _, position in made)
        return [*(loss for loss, _ in made), *(v.read_value() for v in model.variables)]

    equal(step(True), step(False))


def test_seeds_of_the_function_around_it_are_not_used_up():
    """Random operations of a traced function are numbered, and get their seeds from their numbers."""
    model, x, y = Stateful(), tf.constant(normal(6, 4)), tf.constant(normal(6, 3, seed=1))
    model.rate = 0.5
    found = []
    for watched in (False, True):
        tf.random.set_seed(3)

        @tf.function
        def step(x, y, watched=watched):
            noise = tf.random.normal((2,))
            if watched:
                (loss, _), gradients = lnp_tensorflow.value_and_grad(model, (x, y), mean_square)
                lnp.decompose(model, (x, y), mean_square, max_probes=1)
            else:
                loss, gradients = tape(model, x, y, model.trainable_variables)
            return [noise, loss, *gradients, tf.random.normal((2,))]

        model.mean.assign(tf.zeros_like(model.mean))
        found.append([*step(x, y), *step(x, y), model.mean.read_value()])
    equal(*found)


def test_inside_a_function_that_xla_compiles():
    model, x, y = Net(), tf.constant(tokens(5, 2)), tf.constant(normal(5, 4, seed=1))
    step = tf.function(lambda: lnp_tensorflow.value_and_grad(model, (x, y)), jit_compile=True, autograph=False)
    with pytest.raises(ValueError, match="XLA compiles"):
        step()


def test_of_functions():
    """In the structure of their parameters."""
    x, y = tf.constant(normal(5, 3)), tf.constant(normal(5, 2, seed=1))
    p = {"w": [tf.constant(normal(3, 2))], "steps": tf.range(3)}
    _, found = lnp_tensorflow.value_and_grad((lambda p, x: tf.tanh(x @ p["w"][0]), p), (x, y), mean_square)
    v = tf.Variable(p["w"][0])
    expected = tape(lambda x: tf.tanh(x @ v), x, y, [v])[1]
    assert found["steps"] is None
    equal(found["w"], expected)
    equal(lnp_tensorflow.value_and_grad((lambda x: tf.tanh(x @ v), [v]), (x, y), mean_square)[1], expected)


def test_through_batch_statistics():
    """Which are written once, as by the plain step."""
    models, x, y = (Stateful(), Stateful()), tf.constant(normal(6, 4)), tf.constant(normal(6, 3, seed=1))
    (_, d), gradients = lnp_tensorflow.value_and_grad(models[0], (x, y), mean_square)
    assert d.estimator == "joint"
    equal(gradients, tape(models[1], x, y, [models[1].w])[1])
    assert np.array_equal(models[0].mean, models[1].mean)
    assert np.any(models[0].mean != 0)


def test_errors_are_those_of_decompose():
    model, x = Net(), tf.constant(tokens(5, 2))
    with pytest.raises(TypeError, match="lnp_keras"):
        lnp_tensorflow.value_and_grad(object(), (x, x))
    with pytest.raises(ValueError, match="Expected one of"):
        lnp_tensorflow.value_and_grad(model, (x, x), estimator="other")
    assert isinstance(lnp.decompose(model, (x, tf.constant(normal(5, 4)))), lnp.Decomposition)  # nothing is left behind
