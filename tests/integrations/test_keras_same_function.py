"""What a step of Keras computes beside a network's outputs; each pass of a measurement is the same function."""

from __future__ import annotations

import random

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras.src.backend.common import global_state

import lnp
import lnp_keras
from integrations.keras_stateful import BACKEND, data, fresh
from integrations.test_keras_undisturbed import plain

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in Keras, on PyTorch


def numpy(tensor):
    return np.asarray(ops.convert_to_numpy(ops.convert_to_tensor(tensor)), np.float64)


@pytest.mark.parametrize("kind", ["moving", "list", "drawing"])
def test_a_loss_is_evaluated_again_as_it_was(kind):
    model, loss = fresh(("plain",), kind)
    change = lnp.measured_loss_change(model, data(0), loss, learning_rate=1e-2)
    assert change == pytest.approx(-1e-2 * lnp.decompose(model, data(0), loss).rate, rel=0.2)


@pytest.mark.skipif(BACKEND == "jax", reason="there the step differentiates through the normalisation")
def test_a_layer_that_overwrites_what_is_trained():
    """The gradient is taken at what spectral normalisation has written, as in the step."""
    model, _ = fresh(("spectral norm",), "")
    d = lnp.decompose(model, data(0), estimator="joint", max_probes=2)
    value, gradients = plain(model, data(0), None)
    assert d.loss == pytest.approx(float(value), rel=1e-5)
    assert d.rate == pytest.approx(sum(np.sum(numpy(g) ** 2) for g in gradients), rel=1e-4)
    assert any("writes to trained variables" in note for note in d.notes)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the oracle is the step on TensorFlow")
def test_an_optimizer_that_scales_the_loss():
    import tensorflow as tf

    model, _ = fresh((), "")
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=128.0), "mse")
    model.optimizer.build(model.trainable_variables)
    (loss, d), gradients = lnp_keras.value_and_grad(model, data(0))
    with tf.GradientTape() as tape:
        value = model.compute_loss(None, data(0)[1], model(data(0)[0], training=True))
        scaled = model.optimizer.scale_loss(value)
    expected = tape.gradient(scaled, [v.value for v in model.trainable_variables])
    assert float(loss) == float(value)
    assert all(map(np.array_equal, gradients, expected))
    assert d.rate == pytest.approx(sum(np.sum(numpy(g / 128) ** 2) for g in gradients), rel=1e-4)


class Reading(layers.Layer):
    """Reads a number from wherever a user may keep it."""

    shared = 2.0

    def __init__(self, kind):
        super().__init__()
        self.kind, self._private, self.array, self.tensor = kind, 2.0, np.full(3, 2.0), ops.ones(()) * 2.0

    def call(self, x):
        places = {"private": self._private, "class": self.shared, "global": FACTOR[0]}
        return x * {**places, "array": self.array[0], "tensor": self.tensor}[self.kind]


FACTOR = [2.0]


@pytest.mark.skipif(BACKEND == "torch", reason="nothing is compiled there")
@pytest.mark.parametrize("kind", ["private", "class", "global", "array", "tensor"])
def test_what_a_layer_reads_is_read_anew(kind, monkeypatch):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2), Reading(kind)])
    options = {"estimator": "joint", "max_probes": 1, "population": False}
    lnp.decompose(model, data(0), "mse", **options)
    layer = model.layers[-1]
    change = {
        "private": lambda: setattr(layer, "_private", 3.0),
        "class": lambda: monkeypatch.setattr(Reading, "shared", 3.0),
        "global": lambda: monkeypatch.setitem(globals(), "FACTOR", [3.0]),
        "array": lambda: layer.array.fill(3.0),
        "tensor": lambda: setattr(layer, "tensor", ops.ones(()) * 3.0),
    }
    change[kind]()
    value = numpy(ops.mean((model(data(0)[0]) - data(0)[1]) ** 2))
    assert lnp.decompose(model, data(0), "mse", **options).loss == pytest.approx(float(value), rel=1e-5)


@pytest.mark.parametrize("loss", ["mse", "huber", "binary_cross_entropy", None])
def test_losses_by_name(loss):
    model, _ = fresh((), "")
    model.compiled = False
    x, y = data(0)
    (value, d), _ = lnp_keras.value_and_grad(model, (x, np.abs(np.sin(y))), loss)
    assert float(value) == pytest.approx(d.loss, rel=1e-5)


@pytest.mark.parametrize("labels", [np.array([0, 1, 1, -100, 0, 1]), np.eye(2, dtype="float32")[[0, 1, 1, 0, 0, 1]]])
def test_cross_entropy(labels):
    model, _ = fresh((), "")
    (value, d), _ = lnp_keras.value_and_grad(model, (data(0)[0], labels), "cross_entropy")
    assert float(value) == pytest.approx(d.loss, rel=1e-5)


@pytest.mark.skipif(BACKEND == "jax", reason="there Keras refuses such layers in a traced step")
def test_the_global_generator_is_made_by_the_user():
    """At its first use, from Python's random state."""

    class Noise(layers.Layer):
        def call(self, x):
            return x + keras.random.normal(ops.shape(x))

    drawn = []
    for measured in (False, True):
        model = keras.Sequential([keras.Input((4,)), layers.Dense(3), Noise()])
        keras.backend.clear_session()
        global_state.set_global_attribute("global_seed_generator", None)
        random.seed(5)
        if measured:
            y = np.zeros((6, 3), "float32")
            lnp.decompose(model, (data(0)[0], y), "mse", estimator="joint", max_probes=1)
            assert global_state.get_global_attribute("global_seed_generator") is None
        drawn.append((numpy(keras.random.normal((3,))).tolist(), random.getstate()))
    assert drawn[0] == drawn[1]
