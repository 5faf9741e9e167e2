"""What people hand over: wrapped functions, variables that are not trained, losses of Keras, networks that refuse parts
of a batch.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tensorflow as tf

import lnp
import lnp_tensorflow
from contract.namespaces import tensorflow
from integrations.tensorflow_reference import dense
from integrations.test_tensorflow_models import agrees, normal, squared

tensorflow()
X = tf.constant(normal(5, 3))
Y = tf.constant(normal(5, 2, seed=1))


class Shifted(tf.Module):
    """With a counter, a mean that is not trained, and a weight that it holds in several ways."""

    def __init__(self):
        self.w = tf.Variable(normal(3, 2, seed=2))
        self.bias = tf.Variable(normal(2, seed=3))
        self.mean = tf.Variable(normal(2, seed=4), trainable=False)
        self.count = tf.Variable(3)
        self.again = [self.w, {"w": self.w}]

    def __call__(self, x, shift=True):
        return x @ self.w + self.bias - (self.mean if shift else 0.0)

    @property
    def trained(self):
        return [self.w, self.bias]


def exported(model):
    return tf.function(lambda x: model(x)).get_concrete_function(tf.TensorSpec([None, 3], tf.float64))


def loaded(model, tmp_path):
    model.run = tf.function(lambda x: model(x), input_signature=[tf.TensorSpec([None, 3], tf.float64)])
    tf.saved_model.save(model, str(tmp_path))
    return tf.saved_model.load(str(tmp_path))


def of_tree(p, x):
    return x @ p["w"] + p["bias"] - p["mean"]


WRAPPED = {
    "module": lambda m: m,
    "lambda and all variables": lambda m: (lambda x: m(x), m.variables),
    "traced function and all variables": lambda m: (tf.function(lambda x: m(x)), m.variables),
    "bound method": lambda m: (m.__call__, m.trainable_variables),
    "partial": lambda m: (functools.partial(m, shift=True), m.variables),
    "concrete function": lambda m: (exported(m), m.variables),
    "a tree with what is not trained": lambda m: (of_tree, {"w": m.w, "bias": m.bias, "mean": m.mean}),
    "one variable twice": lambda m: (lambda x: m(x), [m.w, m.bias, m.w]),
    "one variable twice in a tree": lambda m: (
        lambda p, x: x @ (p["a"] + p["b"]["a"]) / 2 + p["bias"] - m.mean, {"a": m.w, "b": {"a": m.w}, "bias": m.bias},
    ),
    "names that read the same": lambda m: (
        lambda p, x: x @ p["a"][0] + p["a.0"] - m.mean, {"a": [m.w], "a.0": m.bias}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_trained_parameters_are_measured_once_whatever_they_come_in(name):
    model = Shifted()
    given = WRAPPED[name](model)
    d = lnp.decompose(given, (X, Y), "mse", estimator="exact")
    agrees(d, dense(lambda: model(X), model.trained, squared(Y), 10), "float64")
    (loss, _), gradients = lnp_tensorflow.value_and_grad(given, (X, Y), "mse")
    first = next(g for g in tf.nest.flatten(gradients) if g is not None and g.shape == (3, 2))
    with tf.GradientTape() as tape:
        value = squared(Y)(model(X))
    assert float(loss) == pytest.approx(float(value), rel=1e-12)
    assert first.numpy() == pytest.approx(tape.gradient(value, model.w).numpy(), rel=1e-12)


def test_a_loaded_model_without_a_call(tmp_path):
    model = Shifted()
    restored = loaded(model, tmp_path)
    d = lnp.decompose(restored, (X, Y), "mse", estimator="exact", forward=lambda m, x: m.run(x), by_layer=True)
    agrees(d, dense(lambda: model(X), model.trained, squared(Y), 10), "float64")
    assert set(d.layers) == {"w", "bias"}
    assert lnp.decompose((restored.run, [restored.w, restored.bias, restored.mean]), (X, Y), "mse").rate == d.rate
    with pytest.raises(TypeError, match="cannot be called"):
        lnp.decompose(restored, (X, Y), "mse")


@pytest.mark.parametrize("leaf", [2.0, None, "text", np.ones(2)])
def test_parameters_that_are_no_tensors_are_named(leaf):
    with pytest.raises(TypeError, match=r"The parameters inner\.scale \(\w+\) are no tensors"):
        lnp.decompose((lambda p, x: x @ p["w"], {"w": tf.ones((3, 2)), "inner": {"scale": leaf}}), (X, Y), "mse")


def test_complex_numbers_are_refused():
    z = tf.Variable(tf.complex(normal(3, 2), normal(3, 2)))
    run = lambda x: tf.math.real(tf.cast(x, z.dtype) @ z)
    with pytest.raises(ValueError, match="are complex"):
        lnp.decompose((run, [z]), (X, Y), "mse")
    w = tf.Variable(normal(3, 2))
    with pytest.raises(ValueError, match="returned complex numbers"):
        lnp.decompose((lambda x: [x @ w, tf.complex(x @ w, x @ w)], [w]), (X, Y), lambda f, y: tf.reduce_sum(f[0]))


class Normalised(tf.Module):
    def __init__(self, when):
        self.when, self.w, self.v = when, tf.Variable(normal(3, 4)), tf.Variable(normal(4, 2))

    def __call__(self, x):
        read = x @ self.w if self.when == "after" else None
        write = tf.function(lambda: self.w.assign(self.w / tf.norm(self.w)))
        write() if self.when == "nested" else self.w.assign(self.w / tf.norm(self.w))
        return tf.tanh(x @ self.w if read is None else read) @ self.v


@pytest.mark.parametrize("when", ["before", "after", "nested"])
def test_a_network_that_writes_to_what_is_trained(when):
    """As in a training step, the gradient is taken at what it reads; and the note says so."""
    model = Normalised(when)
    before = model.w.numpy()
    with tf.GradientTape() as tape:
        value = squared(Y)(model(X))
    rate = sum(float(tf.reduce_sum(g**2)) for g in tape.gradient(value, model.trainable_variables))
    model.w.assign(before)
    d = lnp.decompose(model, (X, Y), "mse")
    assert (d.loss, d.rate) == pytest.approx((float(value), rate), rel=1e-10)
    assert any("writes to trained variables" in note for note in d.notes)
    assert np.array_equal(model.w, before)
    other = lnp.decompose(Shifted(), (X, Y), "mse")
    assert not any("writes" in note for note in other.notes)


def refusing(x, kind):
    if kind == "asserts" and x.shape[0] != 5:
        raise AssertionError
    if kind == "raises" and x.shape[0] != 5:
        raise KeyError(x)
    if kind == "asserts in the graph":
        tf.debugging.assert_equal(tf.shape(x)[0], 5)
    return x + tf.ones((5, 3), x.dtype) if kind == "state of the batch's size" else x


@pytest.mark.parametrize("kind", ["asserts", "raises", "asserts in the graph", "state of the batch's size", "ragged"])
def test_networks_that_refuse_parts_of_a_batch_are_measured_jointly(kind):
    w = tf.Variable(normal(3, 2))
    x = tf.RaggedTensor.from_row_lengths(tf.constant(normal(11, 3)), [2, 3, 1, 4, 1]) if kind == "ragged" else X
    run = lambda x: tf.tanh(tf.reduce_mean(x, 1) if kind == "ragged" else refusing(x, kind)) @ w
    d = lnp.decompose((run, [w]), (x, Y), "mse", estimator="exact")
    assert any("not taken apart" in note for note in d.notes), d.notes
    agrees(d, dense(lambda: run(x), [w], squared(Y), 10), "float64")


@pytest.mark.parametrize("kind", ["sparse", "boolean mask", "ragged outputs", "Python in the backward pass"])
def test_what_cannot_be_measured_is_refused_in_a_sentence(kind):
    w = tf.Variable(normal(3, 2))
    run, x, message = {
        "sparse": (lambda x: tf.sparse.sparse_dense_matmul(x, w), tf.sparse.from_dense(X), "not known when"),
        "boolean mask": (lambda x: tf.boolean_mask(x, x[:, 0] > -9) @ w, X, "not known when"),
        "ragged outputs": (
            lambda x: [x @ w, tf.RaggedTensor.from_row_lengths(x @ w, [2, 3])], X, "ragged or sparse tensor",
        ),
        "Python in the backward pass": (
            lambda x: tf.ensure_shape(tf.py_function(tf.tanh, [x @ w], tf.float64), (5, 2)), X, "can run only once",
        ),
    }[kind]  # fmt: skip
    with pytest.raises(ValueError, match=message):
        lnp.decompose((run, [w]), (x, Y), "mse" if kind != "ragged outputs" else lambda f, y: tf.reduce_sum(f[0]))


def test_losses_of_keras_take_the_targets_first():
    keras = pytest.importorskip("keras")
    model, labels = Shifted(), tf.constant([0, 1, 1, 0, 1])
    shares = tf.nn.softmax(Y)
    for loss, targets, terms in (
        (keras.losses.BinaryCrossentropy(from_logits=True), shares, 10),
        (keras.losses.CategoricalCrossentropy(from_logits=True), shares, 5),
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1), labels, 2),
        (keras.losses.MeanSquaredError(reduction="sum"), Y, 1),
    ):
        with tf.GradientTape() as tape:
            f = model(X)
            tape.watch(f)
            value = loss(targets, f)
        g = tape.gradient(value, f)
        d = lnp.decompose(model, (X, targets), loss)
        assert d.loss == pytest.approx(float(value), rel=1e-6)
        assert d.chi_loss == pytest.approx(terms * float(tf.reduce_sum(g**2)), rel=1e-6)
        (again, _), _ = lnp_tensorflow.value_and_grad(model, (X, targets), loss)
        assert float(again) == float(value)


def test_replicas_of_a_strategy():
    """Variables of a strategy, in its scope and in its step: one replica measures as none does."""
    model = Shifted()
    expected = lnp.decompose(model, (X, Y), "mse").rate
    for strategy in (tf.distribute.MirroredStrategy(["CPU:0"]), tf.distribute.OneDeviceStrategy("CPU:0")):
        with strategy.scope():
            copy = Shifted()
            inside = lnp.decompose(copy, (X, Y), "mse").rate
            if isinstance(copy.w, tf.distribute.DistributedValues):  # a step has no one replica's values there
                with pytest.raises(ValueError, match=r"inside of strategy\.scope"):
                    lnp_tensorflow.value_and_grad(copy, (X, Y), "mse")
        measured = strategy.run(lambda: lnp.decompose(copy, (X, Y), "mse").rate)
        outside = lnp.decompose(copy, (X, Y), "mse").rate
        assert (inside, outside, measured) == pytest.approx((expected,) * 3, rel=1e-12)
