"""Statistics are held fixed where that leaves the outputs as they are; elsewhere the network itself is measured."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import lnp
from integrations.keras_reference import BACKEND, numpy

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside Keras
R = np.random.default_rng(0)
X, Y = R.standard_normal((6, 4)).astype("float32"), R.standard_normal((6, 2)).astype("float32")
HELD, DIFFERS = "keeps this batch's statistics", "held fixed the network computes other"
JOINT = {"estimator": "joint", "max_probes": 1, "population": False}


class Twice(layers.Layer):
    """One normalisation, called in several modes."""

    def __init__(self, *modes):
        super().__init__()
        self.norm, self.modes = layers.BatchNormalization(), modes

    def build(self, shape):
        self.norm.build(shape)

    def call(self, x):
        for mode in self.modes:
            x = self.norm(1.5 * ops.tanh(x) + 0.1, training=mode)
        return x


class Halved(layers.BatchNormalization):
    """Does something else in training, whether it is held fixed or not."""

    def call(self, x, training=None, mask=None):
        made = super().call(x, training=training, mask=mask)
        return 0.5 * made if training and self.trainable else made


class Invented(layers.Layer):
    """Statistics of its own; what it writes is read in the same pass."""

    def build(self, shape):
        self.mean = self.add_weight(shape=(shape[-1],), trainable=False, name="mean")

    def call(self, x):
        self.mean.assign(0.5 * self.mean + 0.5 * ops.mean(x, axis=0))
        return x - self.mean


CASES = {
    "batch norm": (lambda: layers.BatchNormalization(), HELD),
    "training inside": (lambda: Twice(True), HELD),
    "inference inside": (lambda: Twice(False), ""),
    "twice": (lambda: Twice(True, True), ""),
    "training, then inference": (lambda: Twice(True, False), DIFFERS),
    "another function in training": (lambda: Halved(), DIFFERS),
    "of the user's own": (lambda: Invented(), ""),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_rate(name):
    build, note = CASES[name]
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), build(), layers.Dense(2)])
    model.compile(keras.optimizers.SGD(1.0), "mse", run_eagerly=True)
    d = lnp.decompose(model, (X, Y), **JOINT)
    assert note in " ".join(d.notes)
    assert bool(d.notes) == bool(note)
    before = [numpy(v.value) for v in model.trainable_variables]
    loss = model.train_on_batch(X, Y)
    rate = sum(np.sum((numpy(v.value) - b) ** 2) for v, b in zip(model.trainable_variables, before, strict=True))
    assert d.loss == pytest.approx(float(loss), rel=1e-5)
    assert (d.rate == pytest.approx(rate, rel=1e-3)) == (note != HELD)


def test_a_masked_normalisation():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((3,), dtype="int32")
    hidden = layers.BatchNormalization()(layers.Embedding(5, 4, mask_zero=True)(inputs))
    model = keras.Model(inputs, layers.Dense(2)(hidden))
    model.compile(keras.optimizers.SGD(1.0), "mse", run_eagerly=True)
    ids, y = np.array([[1, 2, 0], [3, 0, 0], [4, 2, 1]], "int32"), np.ones((3, 3, 2), "float32")
    d = lnp.decompose(model, (ids, y), **JOINT)
    assert HELD in " ".join(d.notes)
    assert d.loss == pytest.approx(float(model.train_on_batch(ids, y)), rel=1e-5)


@pytest.mark.skipif(BACKEND == "jax", reason="there the names are asked for in the same way")
def test_layers_of_one_name_and_what_is_no_parameter():
    class Nested(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = layers.Dense(4, name="same"), layers.Dense(4, name="same")
            self.norm, self.drop = layers.BatchNormalization(name="norm"), layers.Dropout(0.5)

        def call(self, x):
            return self.drop(self.norm(self.second(self.first(x))), training=False)[:, :2]

    model = Nested()
    model(X)
    by = lnp.decompose(model, (X, Y), "mse", parameters="*", by_layer=True, **JOINT)
    assert set(by.layers) == {"same", "same_", "norm"}
    assert sum(layer.rate for layer in by.layers.values()) == pytest.approx(by.rate)
    model.first.trainable = False
    assert set(lnp.decompose(model, (X, Y), "mse", by_layer=True, **JOINT).layers) == {"same_", "norm"}
    assert set(lnp.decompose(model, (X, Y), "mse", by_layer=True, parameters="same*", **JOINT).layers) == {
        "same",
        "same_",
    }
