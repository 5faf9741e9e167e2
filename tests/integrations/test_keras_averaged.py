"""Measuring at the averaged weights that a Keras optimizer keeps (`use_ema`), by a copy of the model; nothing moves."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import lnp

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside Keras
R = np.random.default_rng(0)
X, Y = R.standard_normal((16, 4)).astype("float32"), R.standard_normal((16, 2)).astype("float32")


class AtAverage(keras.callbacks.Callback):
    """Measures at each epoch's end, and remembers the weights of the run and of their average."""

    def __init__(self):
        super().__init__()
        self.measured, self.weights, self.averages = [], [], []

    def on_epoch_end(self, epoch, logs=None):
        averaged = keras.models.clone_model(self.model)
        averaged.set_weights(self.model.get_weights())
        self.model.optimizer.finalize_variable_values(averaged.trainable_variables)
        self.measured.append(lnp.decompose(averaged, (X, Y), "mse"))
        self.weights.append(self.model.get_weights())
        self.averages.append(averaged.get_weights())


def fit(*callbacks):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5), "mse")
    model.fit(X, Y, batch_size=16, epochs=3, verbose=0, callbacks=list(callbacks))
    return model.get_weights()


def test_an_optimizer_s_average_is_measured_and_nothing_moves():
    watched = AtAverage()
    assert all(map(np.array_equal, fit(watched), fit()))
    mean = None
    for d, weights, averages in zip(watched.measured, watched.weights, watched.averages, strict=True):
        mean = weights if mean is None else [0.5 * m + 0.5 * w for m, w in zip(mean, weights, strict=True)]
        assert all(np.allclose(a, m, rtol=1e-5) for a, m in zip(averages, mean, strict=True))
        assert d.loss == pytest.approx(np.mean((X @ mean[0] + mean[1] - Y) ** 2), rel=1e-5)
