"""Net rates of a watched `fit`: the optimizer's own learning rate at each update, and nothing changed."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from lnp_keras.callback import LNPCallback, step_size

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside Keras
R = np.random.default_rng(0)
X = R.standard_normal((32, 4)).astype("float32")
Y = X @ R.standard_normal((4, 2)).astype("float32")
SGD, Decay = keras.optimizers.SGD, keras.optimizers.schedules.ExponentialDecay


class Halving(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.model.optimizer.learning_rate = 0.1 / 2**epoch


def fit(optimizer, *callbacks):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile(optimizer, "mse")
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=list(callbacks))
    return model.get_weights()


@pytest.mark.parametrize(
    ("optimizer", "callbacks", "expected"),
    [
        (lambda: SGD(0.05, momentum=0.5), [], [0.4, 0.2]),
        (lambda: SGD(Decay(0.1, 1, 0.5)), [], [0.1 + 0.05 + 0.025 + 0.0125, 0.00625 + 0.003125]),
        (lambda: SGD(0.1), [Halving()], [0.4, 0.1]),
    ],
    ids=["momentum", "schedule", "changed by a callback"],
)
def test_the_optimizer_s_learning_rate(optimizer, callbacks, expected):
    watched = LNPCallback((X[:12], Y[:12]), schedule=[0, 4, 6])
    weights = fit(optimizer(), *callbacks, watched)
    assert all(map(np.array_equal, weights, fit(optimizer(), *callbacks)))
    rows = watched.tracker.history.rows()
    assert [row["net/learning_rate_sum"] for row in rows[1:]] == pytest.approx(expected, rel=1e-5)
    assert rows[1]["net/loss_fall"] == pytest.approx(rows[0]["loss"] - rows[1]["loss"], rel=1e-4)
    assert rows[1]["net/rate_stderr"] > 0
    assert "net/chi_pos" in rows[1]


def test_an_optimizer_that_rescales_has_no_position():
    watched = LNPCallback((X[:12], Y[:12]), schedule=4)
    fit(keras.optimizers.Adam(0.1), watched)
    row = watched.tracker.history.rows()[1]
    assert row["net/rate"] == pytest.approx(row["net/loss_fall"] / 0.4, rel=1e-5)
    assert "net/chi_pos" not in row
    assert "Adam rescales" in row["notes"]
    assert step_size(SGD(0.25)) == (0.25, "")
