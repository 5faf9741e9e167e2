"""Which loss was measured is told, and those that were probably not meant get a note."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import lnp
from lnp.losses import doubts

RNG = np.random.default_rng(0)
X, LABELS = tf.constant(RNG.normal(size=(24, 6)), tf.float32), tf.constant(RNG.integers(0, 4, 24))
W = tf.Variable(RNG.normal(size=(6, 4)).astype("float32"))


def logits(inputs):
    return inputs @ W


def probabilities(inputs):
    return tf.nn.softmax(inputs @ W)


def own(outputs, targets):
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(targets, outputs))


@pytest.mark.parametrize(("function", "targets", "loss", "expected"), [
    (probabilities, LABELS, None, doubts.TWICE), (probabilities, LABELS, own, doubts.TWICE),
    (logits, LABELS, own, None), (logits, tf.one_hot(LABELS, 4), None, doubts.ONE_HOT),
])  # fmt: skip
def test_notes(function, targets, loss, expected):
    d = lnp.decompose((function, [W]), (X, targets), loss, estimator="joint", max_probes=1)
    assert [note for note in d.notes if note in vars(doubts).values()] == ([] if expected is None else [expected])
    assert d.loss_name.endswith("inferred from the targets" if loss is None else "test_tensorflow_doubts.own")


def test_inside_a_compiled_function():
    """The name is known there, values are not."""
    d = tf.function(lambda: lnp.decompose((probabilities, [W]), (X, LABELS), estimator="joint", max_probes=1))()
    assert d.loss_name == "cross-entropy of logits, inferred from the targets"
    assert d.evidence == {}
