"""The self-check of Keras models: samples that meet later, and backward passes that are no Jacobian's."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import lnp
from integrations.keras_reference import factors

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # inside Keras
    pytest.mark.filterwarnings("ignore:lnp compiled again"),
]
N = 6
X = np.random.default_rng(0).standard_normal((N, 4)).astype("float32")
Y = np.random.default_rng(1).standard_normal((N, 3)).astype("float32")


class Gate(layers.Layer):
    """Adds the batch's mean, where its gates are open."""

    def __init__(self, behind):
        super().__init__()
        self.behind = behind

    def build(self, shape):
        self.first, self.second = (self.add_weight(shape=(), initializer="zeros") for _ in range(2))

    def call(self, x):
        opened = self.first * self.second if self.behind else ops.relu(self.first - 1)
        return x + opened * ops.mean(x, axis=0)


@pytest.mark.parametrize("behind", [True, False], ids=["a gate behind a gate", "a gate at a threshold"])
def test_a_gate_that_opens_later(behind):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5, "tanh"), Gate(behind), layers.Dense(3)])
    for opened in (0.0, 3.0):
        model.layers[1].first.assign(opened)
        model.layers[1].second.assign(opened)
        d = lnp.decompose(model, (X, Y), "mse", estimator="exact")
        expected = factors(lambda: model(X), model, lambda f: np.mean((f - Y) ** 2), 3 * N)
        found = {name: getattr(d, name) for name in expected}
        assert found == pytest.approx(expected, rel=1e-3)
    assert any("interact" in note for note in d.notes), d.notes


@keras.ops.custom_gradient
def clipped(x):
    def backward(*given, upstream=None):
        d = upstream if upstream is not None else given[-1]
        return ops.clip(d, -0.6, 0.6)

    return ops.copy(x) if keras.backend.backend() != "torch" else x * 1.0, backward


class Clip(layers.Layer):
    """Clips what is pulled back."""

    def call(self, x):
        return clipped(x)


@pytest.mark.parametrize("estimator", ["auto", "joint"])
def test_a_backward_pass_that_clips_is_an_error(estimator):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), Clip(), layers.Dense(3)])
    with pytest.raises(ValueError, match="not linear"):
        lnp.decompose(model, (X, Y), "mse", estimator=estimator)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="others keep compiled code")
def test_samples_are_compared_once(monkeypatch):
    """What was found out is remembered as long as the model lives, not as long as a measurement."""
    from lnp_torch import self_check

    made, plan = [], self_check._plan_here
    monkeypatch.setattr(self_check, "_plan_here", lambda *args: made.append(1) or plan(*args))
    model = keras.Sequential([keras.Input((3, 4)), layers.GRU(5), layers.Dense(3)])
    x = np.random.default_rng(2).standard_normal((N, 3, 4)).astype("float32")
    for seed in range(3):
        d = lnp.decompose(model, (x, Y), "mse", seed=seed)
        assert not any("on their own" in note for note in d.notes), d.notes
    assert len(made) == 1
