"""Losses in JAX, from optax and the users' own, against a dense Jacobian: values, and what their mean is taken over."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lnp
from integrations.jax_reference import dense

SAMPLES, CLASSES = 6, 3
LABELS = np.array([0, 2, -100, 1, 2, 2])
CLASS_WEIGHTS = np.array([0.5, 1.0, 2.0])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape)


def soft():
    return np.random.default_rng(2).dirichlet(np.ones(CLASSES), SAMPLES)


def kept(outputs, labels):
    terms = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.maximum(labels, 0))
    return jnp.sum(jnp.where(labels >= 0, terms, 0)) / jnp.sum(labels >= 0)


def smoothed(outputs, labels):
    targets = optax.smooth_labels(jax.nn.one_hot(labels, CLASSES), 0.1)
    return jnp.sum(jnp.where(labels >= 0, optax.softmax_cross_entropy(outputs, targets), 0)) / jnp.sum(labels >= 0)


def by_class(outputs, labels):
    weights = jnp.where(labels >= 0, jnp.asarray(CLASS_WEIGHTS)[labels], 0)
    terms = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.maximum(labels, 0))
    return jnp.sum(weights * terms) / jnp.sum(weights)


def summed(outputs, targets):
    return jnp.sum(optax.huber_loss(outputs, targets, delta=0.3))


def contrastive(outputs, targets):
    """InfoNCE between two parts of each sample's outputs: every sample is in every term."""
    scores = outputs[:, :1] @ outputs[:, 1:2].T + outputs[:, 2:] @ outputs[:, :1].T
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, jnp.arange(len(scores))))


def own(outputs, targets):
    return jnp.mean((outputs.sum(1) - targets) ** 4) + jnp.max(jnp.abs(outputs))


def apply(parameters, x):
    return jnp.tanh(x @ parameters["a"]) @ parameters["b"]


LABELLED, ELEMENTS, ASSUMED = "the labels that are not -100", "the elements of the targets", "the samples"
CASES = {
    "labels, ignored": (None, kept, LABELS, 5, None),
    "optax, ignored": (kept, kept, LABELS, 5, LABELLED),
    "label smoothing": (smoothed, smoothed, LABELS, 5, LABELLED),
    "class weights": (by_class, by_class, LABELS, 5, LABELLED),
    "soft targets": ("cross_entropy", lambda f, y: jnp.mean(optax.softmax_cross_entropy(f, y)), soft(), SAMPLES, None),
    "binary cross-entropy": (
        "binary_cross_entropy",
        lambda f, y: jnp.mean(optax.sigmoid_binary_cross_entropy(f, y)),
        soft(),
        SAMPLES * CLASSES,
        None,
    ),
    "mean squared": (None, lambda f, y: jnp.mean((f - y) ** 2), soft(), SAMPLES * CLASSES, None),
    "Huber": ("huber", lambda f, y: jnp.mean(optax.huber_loss(f, y)), soft(), SAMPLES * CLASSES, None),
    "sum": (summed, summed, soft(), SAMPLES * CLASSES, ELEMENTS),
    "contrastive": (contrastive, contrastive, normal(SAMPLES), SAMPLES, ASSUMED),
    "own": (own, own, normal(SAMPLES), SAMPLES, ASSUMED),
}


@pytest.mark.parametrize("name", CASES)
def test_loss(name):
    loss, function, targets, terms, note = CASES[name]
    parameters = {"a": jnp.asarray(normal(4, 5, seed=3)), "b": jnp.asarray(normal(5, CLASSES, seed=4))}
    x, targets = jnp.asarray(normal(SAMPLES, 4)), jnp.asarray(targets)
    d = lnp.decompose((apply, parameters), (x, targets), loss, estimator="exact")
    expected = dense(lambda p: apply(p, x), parameters, lambda f: function(f, targets), terms)
    assert {value: getattr(d, value) for value in expected} == pytest.approx(expected, rel=1e-10)
    assert (d.loss_terms, d.probes) == (terms, CLASSES)
    assert len(d.notes) == (note is not None)
    assert note is None or note in d.notes[0]


def test_values_per_sample_are_no_loss():
    x, y = jnp.ones((4, 2)), jnp.ones((4, 2))
    with pytest.raises(ValueError, match=r"Expected a scalar\. Average it"):
        lnp.decompose((lambda w, x: x @ w, jnp.ones((2, 2))), (x, y), optax.squared_error)
