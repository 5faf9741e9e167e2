"""Which loss was measured is told, and those that were probably not meant get a note, also of losses of a library's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lnp
import lnp_jax
from lnp.losses import doubts

RNG = np.random.default_rng(0)
X, LABELS = jnp.asarray(RNG.normal(size=(24, 6)), jnp.float32), jnp.asarray(RNG.integers(0, 4, 24))
W = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)


def logits(w, x):
    return x @ w


def probabilities(w, x):
    return jax.nn.softmax(x @ w)


def own(outputs, targets):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


def broadcast(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


@pytest.mark.parametrize(("apply", "w", "targets", "loss", "expected"), [
    (probabilities, W, LABELS, None, doubts.TWICE), (probabilities, W, LABELS, own, doubts.TWICE),
    (logits, W, LABELS, own, None), (logits, W, jax.nn.one_hot(LABELS, 4), None, doubts.ONE_HOT),
    (logits, W[:, :1], X[:, 0], broadcast, doubts.PAIRS),
])  # fmt: skip
def test_notes(apply, w, targets, loss, expected):
    d = lnp.decompose((apply, w), (X, targets), loss, estimator="joint", max_probes=1)
    found = [note for note in d.notes if note in vars(doubts).values()]
    assert found == ([] if expected is None else [expected])
    assert d.loss_name.endswith("inferred from the targets" if loss is None else f"test_jax_doubts.{loss.__name__}")


def test_inside_a_compiled_function():
    """The name is known there, values are not."""
    d = jax.jit(lambda w, key: lnp_jax.decompose(probabilities, w, (X, LABELS), key, estimator="joint"))(
        W, jax.random.key(0)
    )
    assert d.loss_name == "cross-entropy of logits, inferred from the targets"
    assert d.evidence == {}
    assert float(d.preference) == pytest.approx(24 * 4 * float(d.chi_pos))
