"""Spectrum and kernel of a Keras model, by the framework under it."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import lnp


def test_position_three_ways():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(16, "tanh"), keras.layers.Dense(4)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((6, 5)).astype("float32"), np.arange(6) % 4
    d = lnp.decompose(model, batch, estimator="exact")
    k, s = lnp.kernel(model, batch), lnp.spectrum(model, batch, steps=24, estimator="exact", probes=2)
    assert (k.chi_pos, s.chi_pos) == pytest.approx((d.chi_pos, d.chi_pos), rel=1e-5)
    assert s.lambda_max == pytest.approx(k.eigenvalues[0], rel=1e-4)
    theta = lnp.linear_operator(model, batch)
    v = rng.standard_normal(24)
    assert theta @ v == pytest.approx(k.matrix @ v, rel=1e-4, abs=1e-4 * k.eigenvalues[0])
    jacobian = lnp.linear_operator(model, batch, which="jacobian")
    assert jacobian.shape == (24, model.count_params())
    assert jacobian @ (jacobian.T @ v) == pytest.approx(theta @ v, rel=1e-4, abs=1e-4 * k.eigenvalues[0])
