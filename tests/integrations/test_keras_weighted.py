"""Samples that weigh differently in Keras's losses: ignored classes, masks, weights that the mean is divided by."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest

import lnp

SAMPLES, PLACES, CLASSES = 6, 4, 3


def over_pairs(x, y, kernel, weights):
    """sum_{n != m} G_n . G_m / sum_{n != m} w_n w_m of softmax regression, by hand; negative labels take no part."""
    logits = x @ kernel
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    off = (p - np.eye(CLASSES)[np.maximum(y, 0)]) * weights[..., None]
    own, w = np.einsum("ntd,ntc->ndc", x, off).reshape(len(x), -1), weights.sum(axis=1)
    pairs = list(itertools.permutations(range(len(x)), 2))
    return sum(own[i] @ own[j] for i, j in pairs) / sum(w[i] * w[j] for i, j in pairs)


def padded():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(SAMPLES, PLACES, 5)).astype("float32"), rng.integers(0, CLASSES, (SAMPLES, PLACES))
    for row, length in enumerate([4, 1, 2, 4, 3, 1]):
        y[row, length:] = -1
    kernel = rng.normal(size=(5, CLASSES)).astype("float32")
    model = keras.Sequential([keras.Input((PLACES, 5)), keras.layers.Dense(CLASSES, use_bias=False)])
    model.set_weights([kernel])
    return model, x, y, kernel


def test_classes_that_are_ignored():
    model, x, y, kernel = padded()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    expected = over_pairs(x, y, kernel, (y >= 0).astype(float))
    found = lnp.decompose(model, (x, y), loss, estimator="exact", population=True)
    assert found.population.rate == pytest.approx(expected, rel=1e-4)
    model.compile(loss=loss)
    assert lnp.decompose(model, (x, y), estimator="exact", population=True).population.rate == pytest.approx(
        expected, rel=1e-4
    )


def test_weights_that_the_mean_is_divided_by():
    model, x, y, kernel = padded()
    weights = np.where(y < 0, 0.0, np.random.default_rng(1).uniform(0.2, 3, y.shape)).astype("float32")
    reduction = "mean_with_sample_weight"
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction))
    found = lnp.decompose(model, (x, np.maximum(y, 0), weights), estimator="exact", population=True)
    assert found.population.rate == pytest.approx(over_pairs(x, y, kernel, weights), rel=1e-4)
