"""Keras models on KERAS_BACKEND's framework: squared norms of single samples, and sharing with a training step."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import lnp
import lnp_keras
from integrations.keras_reference import BACKEND, jacobian, numpy
from integrations.test_keras_models import MODELS, WIDE, float64, inference, normal, seeded  # noqa: F401 - fixtures

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside Keras
GENERAL = ("LSTM", "GRU")
"""Loops, which take the general way."""
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


class Norms:
    def __call__(self, lin):
        v = lin.signs(3)
        return {"norms": lin.sample_square_norms(v), "v": v, "cheap": lin.cheap, "notes": lin.notes}


NORMS = Norms()


def check(name, dtype):
    build, x = MODELS[name]
    model = build()
    x = x.astype(dtype) if x.dtype.kind == "f" else x
    model(x)
    # in inference mode no samples interact, and statistics stay
    forward = inference if name in ("batch norm", "spectral norm") else None
    batch = x, np.zeros(model(x).shape, dtype)
    found = lnp_keras.evaluate(NORMS, model, (batch,), lnp.Options(loss="mse", forward=forward))
    v = numpy(found["v"])
    rows = jacobian(lambda: model(x), model)[1].reshape(*v.shape, -1)
    pulled = np.einsum("nk,nkp->np", v, rows)
    sizes = np.cumsum([int(np.prod(p.shape)) for p in model.trainable_variables])[:-1]
    expected = np.stack([np.sum(part**2, 1) for part in np.split(pulled, sizes, axis=1)], 1)
    names = {id(p): key for key, p in lnp_keras.models.named_variables(model).items()}
    norms = np.stack([numpy(found["norms"][names[id(p)]]) for p in model.trainable_variables], 1)
    floor = 1e-3 * expected.sum(1, keepdims=True)  # a parameter's own norm may be rounding noise beside the whole
    assert np.all(np.abs(norms - expected) <= TOLERANCE[dtype] * (expected + floor))
    if BACKEND == "tensorflow":
        assert not any("differ" in note for note in found["notes"])
        assert found["cheap"] == (name not in GENERAL), found["notes"]


@pytest.mark.parametrize("name", MODELS)
def test_norms_are_those_of_single_samples(name):
    check(name, "float32")


@pytest.mark.parametrize("name", WIDE if BACKEND == "tensorflow" else WIDE[:0])
def test_norms_in_float64(name, float64):  # noqa: F811
    check(name, "float64")


def classifier(*more):
    model = keras.Sequential([keras.Input((6,)), *more, layers.Dense(5, "tanh"), layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.5), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, (normal(12, 6).astype("float32"), np.arange(12) % 3)


def test_a_training_step_is_that_of_fit():
    """The loss, and the parameters after one step."""
    model, batch = classifier()
    other, _ = classifier()
    other.set_weights(model.get_weights())
    (loss, d), gradients = lnp_keras.value_and_grad(model, batch)
    model.optimizer.apply(gradients, model.trainable_variables)
    seen = other.fit(*batch, batch_size=12, epochs=1, verbose=0).history["loss"][0]
    assert loss == d.loss == pytest.approx(seen, rel=1e-6)
    for ours, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        assert np.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    squares = sum(float(ops.sum(g**2)) for g in gradients)
    assert d.rate == pytest.approx(squares, rel=1e-5)


def test_gradients_in_the_order_of_the_trained_variables():
    model, batch = classifier(layers.BatchNormalization())
    _, gradients = lnp_keras.value_and_grad(model, batch)
    assert [tuple(g.shape) for g in gradients] == [tuple(v.shape) for v in model.trainable_variables]
    model.layers[0].trainable = False
    _, fewer = lnp_keras.value_and_grad(model, batch)
    assert [tuple(g.shape) for g in fewer] == [tuple(v.shape) for v in model.trainable_variables]
    _, picked = lnp_keras.value_and_grad(model, batch, parameters="*bias")
    assert [tuple(g.shape) for g in picked] == [(5,), (3,)]


def test_only_keras_models():
    with pytest.raises(TypeError, match="Expected a Keras model"):
        lnp_keras.value_and_grad(object(), (1, 2))
