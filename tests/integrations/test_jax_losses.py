"""Losses by name, Optax's and the user's own: the factors against a dense Jacobian, and what the loss averages over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lnp
from integrations.jax_reference import agrees, dense

N, T, C = 6, 2, 3
GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((N, 4))
SEQUENCES = GENERATOR.standard_normal((N, T, 4))
W = {"w": GENERATOR.standard_normal((4, C)), "b": GENERATOR.standard_normal(C)}
LABELS = np.array([0, 1, 2, 0, 1, 1])
TOKENS = np.array([[0, 1], [2, -100], [-100, -100], [1, 1], [0, 2], [-100, 2]])
VALUES = 2 * GENERATOR.standard_normal((N, C))
PROBABILITIES = np.exp(VALUES) / np.exp(VALUES).sum(-1, keepdims=True)
BITS = (VALUES > 0).astype(int)
WEIGHTS = np.array([0.5, 1.0, 3.0])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def apply(parameters, x):
    return 2 * jnp.tanh(x @ parameters["w"]) + parameters["b"]


def nll(outputs, labels):
    """-log p of each label, by the definition."""
    p = jnp.exp(outputs) / jnp.exp(outputs).sum(-1, keepdims=True)
    return -jnp.log(p[jnp.arange(len(labels)), labels])


def of_kept(outputs, targets):
    """The mean over the four sequences' labels that are not -100."""
    kept = np.argwhere(TOKENS != -100)
    return nll(outputs[kept[:, 0], kept[:, 1]], TOKENS[TOKENS != -100]).mean()


def ignoring(outputs, labels):
    kept = labels != -100
    each = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.where(kept, labels, 0))
    return jnp.sum(each * kept) / jnp.sum(kept)


def smoothed(outputs, labels):
    return optax.softmax_cross_entropy(outputs, optax.smooth_labels(jax.nn.one_hot(labels, C), 0.1)).mean()


def weighted(outputs, labels):
    each = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    weights = jnp.asarray(WEIGHTS)[labels]
    return jnp.sum(weights * each) / jnp.sum(weights)


def interacting(outputs, targets):
    """No mean over samples: the largest error counts most."""
    return jax.nn.logsumexp(jnp.abs(outputs - targets) ** 3) + jnp.prod(outputs.mean(0))


class Stated:
    """A loss that says what it averages over."""

    separable = True

    def __call__(self, outputs, targets):
        return optax.squared_error(outputs, targets).sum(-1).mean()

    def loss_terms(self, outputs, targets):
        return len(targets), ("said by the loss",)


class Case(NamedTuple):
    loss: Any
    targets: np.ndarray
    reference: Callable
    terms: int
    note: str = ""
    x: np.ndarray = X


binary = lambda f, y: -(y * jnp.log(1 / (1 + jnp.exp(-f))) + (1 - y) * jnp.log(1 / (1 + jnp.exp(f)))).mean()
pieces = lambda f, y: jnp.where(abs(f - y) <= 1, (f - y) ** 2 / 2, abs(f - y) - 0.5).mean()
soft = lambda f, y: (y * (jnp.log(jnp.exp(f).sum(-1, keepdims=True)) - f)).sum(-1).mean()
smooth = lambda f, y: soft(f, 0.9 * np.eye(C)[y] + 0.1 / C)
labels_assumed, elements_assumed, samples_assumed = "counts the labels", "counts the elements", "counts the samples"
CASES = {
    "cross-entropy": Case("cross_entropy", LABELS, lambda f, y: nll(f, y).mean(), N),
    "cross-entropy inferred": Case(None, LABELS, lambda f, y: nll(f, y).mean(), N),
    "cross-entropy, ignored labels": Case("cross_entropy", TOKENS, of_kept, 8, x=SEQUENCES),
    "cross-entropy, ignored labels, by hand": Case(ignoring, TOKENS, of_kept, 8, labels_assumed, x=SEQUENCES),
    "cross-entropy, sum": Case(
        lambda f, y: optax.softmax_cross_entropy_with_integer_labels(f, y).sum(), LABELS,
        lambda f, y: nll(f, y).sum(), N, labels_assumed,
    ),
    "label smoothing": Case(smoothed, LABELS, smooth, N, labels_assumed),
    "class weights": Case(
        weighted, LABELS, lambda f, y: WEIGHTS[y] @ nll(f, y) / WEIGHTS[y].sum(), N, labels_assumed
    ),
    "soft targets": Case("cross_entropy", PROBABILITIES, soft, N),
    "soft targets of sequences": Case(
        "cross_entropy", np.stack([PROBABILITIES, PROBABILITIES[::-1]], 1), soft, N * T, x=SEQUENCES
    ),
    "soft targets by Optax": Case(
        lambda f, y: optax.softmax_cross_entropy(f, y).mean(), PROBABILITIES, soft, N * C, elements_assumed
    ),
    "binary cross-entropy": Case("binary_cross_entropy", PROBABILITIES, binary, N * C),
    "binary cross-entropy, bits": Case("binary_cross_entropy", BITS, binary, N * C),
    "binary cross-entropy, truth values": Case("binary_cross_entropy", BITS.astype(bool), binary, N * C),
    "binary cross-entropy by Optax": Case(
        lambda f, y: optax.sigmoid_binary_cross_entropy(f, y).mean(), PROBABILITIES, binary, N * C, elements_assumed
    ),
    "mse": Case("mse", VALUES, lambda f, y: ((f - y) ** 2).mean(), N * C),
    "mse inferred": Case(None, VALUES, lambda f, y: ((f - y) ** 2).mean(), N * C),
    "mse by Optax": Case(
        lambda f, y: optax.squared_error(f, y).mean(), VALUES, lambda f, y: ((f - y) ** 2).mean(), N * C,
        elements_assumed,
    ),
    "mse, sum": Case(
        lambda f, y: optax.squared_error(f, y).sum(), VALUES, lambda f, y: ((f - y) ** 2).sum(), N * C,
        elements_assumed,
    ),
    "huber": Case("huber", VALUES, pieces, N * C),
    "huber by Optax": Case(
        lambda f, y: optax.huber_loss(f, y).mean(), VALUES, pieces, N * C, elements_assumed
    ),
    "coupling the samples": Case(
        interacting, VALUES,
        lambda f, y: jnp.log(jnp.exp(abs(f - y) ** 3).sum()) + f.mean(0)[0] * f.mean(0)[1] * f.mean(0)[2],
        N * C, elements_assumed,
    ),
    "without targets": Case(lambda f, y: jnp.mean(f**4), None, lambda f, y: (f**4).mean(), N, samples_assumed),
    "stated": Case(Stated(), VALUES, lambda f, y: ((f - y) ** 2).sum(-1).mean(), N, "said by the loss"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss(case):
    d = lnp.decompose((apply, W), (case.x, case.targets), case.loss, estimator="exact")
    outputs = C * case.x[0].size // 4
    expected = dense(lambda p: apply(p, case.x), W, lambda f: case.reference(f, case.targets), case.terms)
    agrees(d, expected)
    assert (d.loss_terms, d.probes) == (case.terms, outputs)  # samples apart, also where the loss couples them
    notes = [note for note in d.notes if not note.startswith("no population values")]
    assert [note for note in notes if case.note and case.note in note] == notes
    assert bool(d.notes) == bool(case.note)


def test_terms_that_are_said_are_not_assumed():
    case = CASES["soft targets by Optax"]
    d = lnp.decompose((apply, W), (case.x, case.targets), case.loss, estimator="exact", loss_terms=N)
    agrees(d, dense(lambda p: apply(p, case.x), W, lambda f: soft(f, case.targets), N))
    assert d.loss_terms == N
    assert not any("loss_terms" in note for note in d.notes)


def two_views(parameters, inputs):
    return {view: jnp.tanh(x @ parameters["w"]) + parameters["b"] for view, x in inputs.items()}


def info_nce(outputs, targets):
    """Each sample's two views are to find each other among the batch's."""
    left, right = (f / jnp.linalg.norm(f, axis=-1, keepdims=True) for f in (outputs["left"], outputs["right"]))
    return optax.softmax_cross_entropy_with_integer_labels(left @ right.T / 0.2, jnp.arange(len(left))).mean()


def test_contrastive_loss():
    views = {"left": X, "right": X + 0.3 * SEQUENCES[:, 0]}
    d = lnp.decompose((two_views, W), (views, None), info_nce, estimator="exact", population=True)

    def reference(f):
        unit = f.reshape(N, 2, C) / jnp.sqrt((f.reshape(N, 2, C) ** 2).sum(-1, keepdims=True))
        return nll(jnp.einsum("ik,jk->ij", unit[:, 0], unit[:, 1]) / 0.2, np.arange(N)).mean()

    flat = lambda p: jnp.concatenate([two_views(p, views)[view] for view in ("left", "right")], axis=1)
    agrees(d, dense(flat, W, reference, N))
    assert (d.loss_terms, d.probes, d.population) == (N, 2 * C, None)
    assert any(samples_assumed in note for note in d.notes)
    assert any("population" in note for note in d.notes)


def scaled(parameters, x):
    return parameters * x


NAMED = {
    "huber": (lambda f, y: optax.huber_loss(f, y).mean(), [0.0, 1.0, -1.0, 1e6, -1e6]),
    "binary_cross_entropy": (lambda f, y: optax.sigmoid_binary_cross_entropy(f, y).mean(), [0.0, 40, -40, 800, -800]),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_named_losses_at_their_edges(name, target):
    reference, outputs = NAMED[name]
    outputs, targets = np.array(outputs)[:, None], np.full((5, 1), target)
    d = lnp.decompose((scaled, np.ones(())), (outputs, targets), name, estimator="exact")
    agrees(d, dense(lambda p: p * outputs, jnp.ones(()), lambda f: reference(f, targets), 5))


PER_EXAMPLE = {
    "softmax_cross_entropy": PROBABILITIES,
    "softmax_cross_entropy_with_integer_labels": LABELS,
    "sigmoid_binary_cross_entropy": PROBABILITIES,
    "sigmoid_focal_loss": PROBABILITIES,
    "huber_loss": VALUES,
    "squared_error": VALUES,
    "l2_loss": VALUES,
    "log_cosh": VALUES,
    "cosine_distance": VALUES,
    "kl_divergence": PROBABILITIES,
}


@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_per_example_values_are_to_be_averaged(name):
    loss, batch = getattr(optax, name), (X, PER_EXAMPLE[name])
    with pytest.raises(ValueError, match=r"loss has shape \(6,.*Average it"):
        lnp.decompose((apply, W), batch, loss)
    with pytest.raises(ValueError, match="Average it"):
        jax.jit(lambda p: lnp.decompose((apply, p), batch, loss).rate)(W)


@pytest.mark.parametrize("name", ["binary_cross_entropy", "huber", "mse"])
def test_elementwise_losses_do_not_broadcast(name):
    with pytest.raises(ValueError, match="do not match"):
        lnp.decompose((apply, W), (X, VALUES[:, :1]), name)
    with pytest.raises(ValueError, match="one array each"):
        lnp.decompose((two_views, W), ({"left": X}, VALUES), name)


def test_what_is_no_loss_or_no_array_is_said():
    def apply(p, x):
        return x @ p["w"]

    with pytest.raises(TypeError, match="returned None"):
        lnp.decompose((apply, W), (jnp.asarray(X), jnp.asarray(LABELS)), lambda outputs, targets: None)
    with pytest.raises(TypeError, match="inputs are nested lists of 6 rows"):
        lnp.decompose((apply, {"w": jnp.ones((4, C))}), (X.tolist(), LABELS))
    with pytest.raises(TypeError, match="list of ArrayImpl"):
        lnp.decompose((apply, {"w": jnp.ones((4, C))}), (X, LABELS), parameters=[jnp.ones(3)])
