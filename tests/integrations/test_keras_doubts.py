"""Which loss was measured is told, and compiled losses that were probably not meant get a note."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import lnp
from lnp.losses import doubts

RNG = np.random.default_rng(0)
X, LABELS = RNG.normal(size=(24, 6)).astype("float32"), RNG.integers(0, 4, 24)
ONE_HOT, BINARY = np.eye(4, dtype="float32")[LABELS], (LABELS[:, None] > 1).astype("float32")
SPARSE, BINARY_LOSS = keras.losses.SparseCategoricalCrossentropy, keras.losses.BinaryCrossentropy


def own(outputs, targets):
    return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(targets, outputs, from_logits=True))


@pytest.mark.filterwarnings("ignore:.* received `from_logits=True`:UserWarning")  # Keras on TensorFlow sees it as well
@pytest.mark.parametrize(("activation", "targets", "loss", "expected"), [
    (None, LABELS, SPARSE(), doubts.NO_PROBABILITIES),
    (None, LABELS, "crossentropy", doubts.NO_PROBABILITIES),
    (None, BINARY, BINARY_LOSS(), doubts.NO_PROBABILITIES),
    ("softmax", LABELS[:, None], SPARSE(from_logits=True), doubts.TWICE),
    ("softmax", LABELS, own, doubts.TWICE),
    (None, LABELS, SPARSE(from_logits=True), None),
    ("softmax", LABELS, "sparse_categorical_crossentropy", None),
    ("sigmoid", BINARY, "binary_crossentropy", None),
    (None, ONE_HOT, "mse", None),
])  # fmt: skip
def test_notes(activation, targets, loss, expected):
    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense(targets.shape[-1] if targets.dtype == "float32" else 4, activation)
    model = keras.Sequential([keras.Input((6,)), dense])
    if loss is not own:
        model.compile("sgd", loss)
    d = lnp.decompose(model, (X, targets), own if loss is own else None, estimator="joint", max_probes=1)
    assert [note for note in d.notes if note in vars(doubts).values()] == ([] if expected is None else [expected])
    assert d.loss_name.endswith(".own" if loss is own else getattr(loss, "__name__", d.loss_name))
    assert not d.loss_name.startswith("lnp")


def test_name_of_what_layers_add():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2, activity_regularizer="l2")])
    model.compile("sgd")
    d = lnp.decompose(model, (X, None), estimator="joint", max_probes=1)
    assert d.loss_name == "what the model's layers add to the loss"
