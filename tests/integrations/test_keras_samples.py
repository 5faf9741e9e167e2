"""Keras models on KERAS_BACKEND's framework share a training step."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import lnp_keras
from integrations.test_keras_models import normal, seeded  # noqa: F401 - a fixture

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside Keras


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
