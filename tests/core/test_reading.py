"""The scale for a position: what chi_pos N K is for gradients with and without preference, and which number counts."""

from __future__ import annotations

import numpy as np
import pytest

import lnp
import lnp_numpy

RNG = np.random.default_rng(0)


def position(theta: np.ndarray, g: np.ndarray) -> np.ndarray:
    """g^T Theta g / (||g||^2 tr Theta) for each row of g."""
    return np.einsum("bi,ij,bj->b", g, theta, g) / np.sum(g * g, axis=1) / np.trace(theta)


def linear(n: int, features: int, outputs: int) -> tuple:
    """A linear model with outputs that respond alike, and inputs of decaying variance; Theta = X X^T x 1."""
    x = RNG.normal(size=(n, features)) * 0.7 ** np.arange(features)
    return lnp_numpy.LinearModel(weight=np.zeros((features, outputs))), x, np.kron(x @ x.T, np.eye(outputs))


def test_no_preference_is_one():
    """Gradients of random directions have the mean 1, whatever the spectrum, also of a kernel of low rank."""
    model, x, theta = linear(8, 3, 2)
    g = RNG.normal(size=(20_000, 16))
    assert np.mean(16 * position(theta, g)) == pytest.approx(1.0, abs=0.03)
    d = lnp.decompose(model, (x, RNG.normal(size=(8, 2))), "mse")
    assert d.preference == pytest.approx(16 * d.chi_pos)
    k = lnp.kernel(model, (x, RNG.normal(size=(8, 2))), "mse")
    assert k.preference == pytest.approx(16 * k.chi_pos)
    assert np.allclose(k.matrix, theta)


@pytest.mark.parametrize(("classes", "kept"), [(2, 8), (10, 8), (4, 3)])
def test_softmax_and_padding_leave_the_count_at_all_outputs(classes, kept):
    """Rows that sum to zero and samples without a gradient: N K is right where outputs respond alike on average, and
    the number of directions that are left, kept (K - 1), is not: the trace is over all outputs.
    """
    n = 8
    x = RNG.normal(size=(n, 30))
    theta = np.kron(x @ x.T / 30, np.eye(classes))
    g = RNG.normal(size=(20_000, n, classes))
    g -= g.mean(axis=2, keepdims=True)
    g[:, kept:] = 0
    found = np.mean(position(theta, g.reshape(len(g), -1)))
    left = np.trace(theta.reshape(n, classes, n, classes)[:kept, :, :kept].reshape(kept * classes, -1)) / kept
    alike = left / (np.trace(theta) / n)  # the mean response of the samples that are kept, in units of that of all
    assert n * classes * found == pytest.approx(alike, rel=0.03)
    assert kept * (classes - 1) * found == pytest.approx(alike * kept * (classes - 1) / (n * classes), rel=0.03)


def test_participation_ratio_is_the_position_of_random_parameters():
    """A mistake J u of parameters that are off in random directions has w_i ~ lambda_i: 1/chi_pos is the ratio."""
    _, x, theta = linear(6, 4, 1)
    u = RNG.normal(size=(40_000, 4))
    g = u @ x.T
    mean = np.mean(np.einsum("bi,ij,bj->b", g, theta, g)) / np.mean(np.sum(g * g, axis=1)) / np.trace(theta)
    assert 1 / mean == pytest.approx(np.trace(theta) ** 2 / np.sum(theta**2), rel=0.03)


def test_participation_ratio_of_a_spectrum():
    model, x, theta = linear(12, 5, 2)
    batch = (x, RNG.normal(size=(12, 2)))
    s = lnp.spectrum(model, batch, "mse", probes=200, estimator="exact")
    exact = np.trace(theta) ** 2 / np.sum(theta**2)
    assert s.participation_ratio == pytest.approx(exact, rel=0.1)
    assert s.preference == pytest.approx(lnp.decompose(model, batch, "mse").preference, rel=1e-6)
    assert lnp.kernel(model, batch, "mse").participation_ratio == pytest.approx(exact)
    assert f"{s.participation_ratio:.4g}   participation ratio" in str(s)
    assert np.isnan(lnp.spectrum(model, batch, "mse").participation_ratio)


def test_a_file_tells_loss_and_preference(tmp_path):
    """Of both batches: texts beside numbers, also under the names of measured ones."""
    model, x, _ = linear(8, 3, 2)
    batch = (x, RNG.normal(size=(8, 2)))
    with lnp.Tracker(tmp_path / "run.jsonl", [0], batch=batch, loss="mse") as tracker:
        d = tracker.observe(0, model, batch)
    run = lnp.History.read(tmp_path / "run.jsonl")
    assert run["preference"] == pytest.approx([d.preference])
    assert run["measured/preference"] == pytest.approx([d.preference])
    assert list(run["loss_name"]) == list(run["measured/loss_name"]) == ["mean squared error"]


def test_preference_grows_with_the_batch():
    """K chi_pos (N + B) with the population's position and the noise scale B: doubling a large batch doubles it."""
    weights = np.array([1.0, -2.0, 0.5])
    model = lnp_numpy.LinearModel(weight=np.zeros((3, 1)))
    found = {}
    for n in (32, 512):
        values = []
        for _ in range(60):
            x = RNG.normal(size=(n, 3))
            y = x @ weights[:, None] + 4 * RNG.normal(size=(n, 1))
            values.append(lnp.decompose(model, (x, y), "mse").preference)
        found[n] = np.mean(values)
    x = RNG.normal(size=(20_000, 3))
    whole = lnp.decompose(model, (x, x @ weights[:, None] + 4 * RNG.normal(size=(20_000, 1))), "mse").population
    expected = {n: whole.chi_pos * (n + whole.noise_scale) for n in found}
    assert found == pytest.approx(expected, rel=0.15)
