"""Compiled losses of Keras models: the value that `fit` reports, its gradient, and what its mean is taken over."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, losses, ops

import lnp
from integrations.keras_reference import BACKEND, factors

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside Keras
N, C = 6, 3
X = np.random.default_rng(0).standard_normal((N, 4)).astype("float32")
LABELS = np.array([0, 2, 1, 1, 2, 2])
VALUES = np.random.default_rng(1).standard_normal((N, C)).astype("float32")
SOFT = np.random.default_rng(2).dirichlet(np.ones(C), N).astype("float32")
WEIGHTS = np.array([1.0, 0.0, 2.0, 0.5, 1.0, 3.0], "float32")


def network(activation=None, regularizer=None):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([layers.Dense(5, "tanh", kernel_regularizer=regularizer), layers.Dense(C, activation)])
    model(X)
    return model


def log_softmax(f):
    f = f - f.max(-1, keepdims=True)
    return f - np.log(np.exp(f).sum(-1, keepdims=True))


def picked(f, labels=LABELS):
    return -log_softmax(f)[np.arange(N), labels]


def smooth(f):
    return -((0.9 * np.eye(C)[LABELS] + 0.1 / C) * log_softmax(f)).sum(-1)


def huber(f):
    distance = np.abs(f - VALUES)
    return np.where(distance < 1, distance**2 / 2, distance - 0.5)


def binary(f):
    return np.logaddexp(0, f) - SOFT * f


def own(y_true, y_pred):
    return ops.mean((y_pred - y_true) ** 4, axis=-1)


SPARSE, ASSUMED = losses.SparseCategoricalCrossentropy, "assumed"
CASES = {
    "labels": (SPARSE(from_logits=True), LABELS, None, lambda f: picked(f).mean(), N, ""),
    "sample weights": (
        SPARSE(from_logits=True), LABELS, WEIGHTS, lambda f: (WEIGHTS * picked(f)).mean(), N, "sample weights",
    ),
    "weighted mean": (
        SPARSE(from_logits=True, reduction="mean_with_sample_weight"), LABELS, WEIGHTS,
        lambda f: (WEIGHTS * picked(f)).sum() / WEIGHTS.sum(), N, "sample weights",
    ),
    "ignored class": (
        SPARSE(from_logits=True, ignore_class=1), LABELS, None, lambda f: picked(f)[LABELS != 1].mean(), 4, "",
    ),
    "label smoothing": (
        losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1), np.eye(C, dtype="float32")[LABELS], None,
        lambda f: smooth(f).mean(), N, "",
    ),
    "sum": (SPARSE(from_logits=True, reduction="sum"), LABELS, None, lambda f: picked(f).sum(), 1, "is a sum"),
    "binary cross-entropy": (
        losses.BinaryCrossentropy(from_logits=True), SOFT, None, lambda f: binary(f).mean(), N * C, "",
    ),
    "mean squared, by name": ("mse", VALUES, None, lambda f: ((f - VALUES) ** 2).mean(), N * C, ""),
    "Huber": (losses.Huber(), VALUES, None, lambda f: huber(f).mean(), N * C, ""),
    "own": (own, VALUES, None, lambda f: ((f - VALUES) ** 4).mean(), N, ASSUMED),
}  # fmt: skip


def agrees(d, expected):
    assert {name: getattr(d, name) for name in expected} == pytest.approx(expected, rel=2e-5)


PASSED = ("weighted mean", "ignored class", "sum")
"""Given to lnp itself as well."""
if BACKEND != "tensorflow":  # Keras's own losses say the same on each framework
    CASES = {name: CASES[name] for name in (*PASSED, "own")}


@pytest.mark.parametrize(("name", "compiled"), [*((name, True) for name in CASES), *((name, False) for name in PASSED)])
def test_loss(name, compiled):
    loss, y, weights, reference, terms, note = CASES[name]
    model = network()
    batch = (X, y) if weights is None else (X, y, weights)
    if compiled:
        model.compile("sgd", loss)
    d = lnp.decompose(model, batch, None if compiled else loss, estimator="exact")
    agrees(d, factors(lambda: model(X), model, reference, terms))
    assert d.loss_terms == terms
    assert d.probes == C
    assert bool(d.notes) == bool(note)
    assert note in " ".join(d.notes)
    if compiled:
        assert d.loss == pytest.approx(model.evaluate(*batch[:2], sample_weight=weights, verbose=0), rel=1e-5)


def test_probabilities():
    model = network("softmax")
    model.compile("sgd", "sparse_categorical_crossentropy")
    d = lnp.decompose(model, (X, LABELS), estimator="exact")
    agrees(d, factors(lambda: model(X), model, lambda f: -np.log(f[np.arange(N), LABELS] / f.sum(-1)).mean(), N))


def test_a_mask_leaves_terms_out():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([layers.Embedding(5, 4, mask_zero=True), layers.Dense(C)])
    ids, y = np.array([[1, 2, 0], [3, 0, 0]]), np.zeros((2, 3), int)
    model(ids)
    model.compile("sgd", SPARSE(from_logits=True))
    d = lnp.decompose(model, (ids, y), estimator="exact")
    reference = lambda f: -log_softmax(f.reshape(2, 3, C))[ids != 0][:, 0].mean()
    agrees(d, factors(lambda: model(ids), model, reference, 3))
    assert d.loss_terms == 3


def test_regularisation_is_left_out_and_said():
    model = network(regularizer="l2")
    model.compile("sgd", "mse")
    d = lnp.decompose(model, (X, VALUES), estimator="exact")
    agrees(d, factors(lambda: model(X), model, lambda f: ((f - VALUES) ** 2).mean(), N * C))
    assert any("regularisation" in note for note in d.notes)


@pytest.mark.parametrize("where", ["kernel_regularizer", "activity_regularizer"])
def test_terms_that_layers_add_are_left_out(where):
    """Also those that are not zero where the weights are."""
    model = network()
    setattr(model.layers[0], where, lambda values: ops.sum((values - 1) ** 2))
    model.layers[0].kernel.regularizer = model.layers[0].kernel_regularizer
    model(X)
    model.compile("sgd", "mse")
    d = lnp.decompose(model, (X, VALUES), estimator="exact")
    agrees(d, factors(lambda: model(X), model, lambda f: ((f - VALUES) ** 2).mean(), N * C))


def test_several_outputs():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    a, b = layers.Dense(2, name="a")(inputs), layers.Dense(1, name="b")(inputs)
    model = keras.Model(inputs, {"a": a, "b": b})
    model.compile("sgd", {"a": "mse", "b": "mae"}, loss_weights={"a": 1.0, "b": 0.5})
    y = {"a": VALUES[:, :2], "b": VALUES[:, 2:]}
    d = lnp.decompose(model, (X, y), estimator="exact")
    assert not model._compile_loss.built  # nothing is left of the first use
    joined = lambda: ops.concatenate([model(X)["a"], model(X)["b"]], axis=1)
    reference = lambda f: ((f[:, :2] - y["a"]) ** 2).mean() + 0.5 * np.abs(f[:, 2:] - y["b"]).mean()
    agrees(d, factors(joined, model, reference, N))
    assert any("assumed" in note for note in d.notes)


class Contrasting(keras.Sequential):
    """InfoNCE between two parts of each sample's outputs: every sample is in every term."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        scores = y_pred[:, :1] @ ops.transpose(y_pred[:, 1:2]) + y_pred[:, 2:] @ ops.transpose(y_pred[:, :1])
        return ops.mean(losses.sparse_categorical_crossentropy(ops.arange(N), scores, from_logits=True))


def test_own_compute_loss():
    keras.utils.set_random_seed(0)
    model = Contrasting([layers.Dense(C)])
    model(X)
    model.compile("sgd")

    def reference(f):
        return picked(f[:, :1] @ f[:, 1:2].T + f[:, 2:] @ f[:, :1].T, np.arange(N)).mean()

    d = lnp.decompose(model, (X, LABELS), estimator="exact", population=True)
    agrees(d, factors(lambda: model(X), model, reference, N))
    assert d.probes == C
    assert d.population is None


@pytest.mark.parametrize(("loss", "given"), [("mse", True), (losses.MeanSquaredError(reduction="sum"), False)])
def test_the_population_needs_a_mean_over_samples(loss, given):
    model = network()
    model.compile("sgd", loss)
    assert (lnp.decompose(model, (X, VALUES), population=True).population is not None) is given


def test_compiling_again_is_seen():
    model = network()
    model.compile("sgd", "mse")
    squared = lnp.decompose(model, (X, VALUES)).loss
    model.compile("sgd", "mae")
    assert lnp.decompose(model, (X, VALUES)).loss == pytest.approx(
        np.abs(np.asarray(model.predict(X, verbose=0)) - VALUES).mean()
    )
    assert squared != lnp.decompose(model, (X, VALUES)).loss


def test_training_after_a_measurement_is_what_it_was():
    results = []
    for measured in (False, True):
        model = network()
        model.add(layers.Dropout(0.3, seed=1))
        model.compile("adam", "mse")
        if measured:
            lnp.decompose(model, (X, VALUES))
        model.fit(X, VALUES, epochs=2, batch_size=3, shuffle=False, verbose=0)
        if measured:
            lnp.decompose(model, (X, VALUES))
        results.append([w.tobytes() for w in model.get_weights()])
    assert results[0] == results[1]


def test_errors():
    with pytest.raises(ValueError, match="is not built"):
        lnp.decompose(keras.Sequential([layers.Dense(2)]), (X, LABELS))
    with pytest.raises(ValueError, match="not compiled"):
        lnp.decompose(network(), (X, LABELS, WEIGHTS))
    with pytest.raises(ValueError, match="does not take them"):
        lnp.decompose(network(), (X, LABELS, WEIGHTS), lambda f, y: ops.mean(f))
    with pytest.raises(TypeError, match="sample_weight"):
        lnp.decompose(network(), (X,))
    with pytest.raises(ValueError, match="Unknown loss"):
        lnp.decompose(network(), (X, LABELS), "no such loss")


def test_an_uncompiled_model_is_measured_with_a_note():
    d = lnp.decompose(network(), (X, LABELS))
    assert any("not compiled" in note for note in d.notes)


def test_backends_that_cannot_train_are_named(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "numpy")
    with pytest.raises(ValueError, match="Keras runs on 'numpy', which cannot differentiate"):
        lnp.decompose(network(), (X, LABELS))
