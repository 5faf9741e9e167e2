"""What spectrum, kernel and operators of a network must be, from its dense Jacobian."""

from __future__ import annotations

import numpy as np
import pytest

import lnp

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
"""Of entries of the kernel and of the position, relative."""
SPECTRAL = {"float32": 1e-4, "float64": 1e-8}
"""Of eigenvalues, relative to the largest, and of weights: N K steps that each round."""


def check(model, batch, loss, jacobian, g, dtype, **options):
    """Kernel, measure, density, operators and position of `model`, against J (N K, P) and g (N, K)."""
    j, g, tolerance = np.asarray(jacobian, float), np.asarray(g, float), TOLERANCE[dtype]
    theta, flat = j @ j.T, g.reshape(-1)
    position = flat @ theta @ flat / (flat @ flat) / np.trace(theta)
    d = lnp.decompose(model, batch, loss, estimator="exact", **options)
    k = lnp.kernel(model, batch, loss, **options)
    assert k.matrix == pytest.approx(theta, rel=tolerance, abs=tolerance * np.abs(theta).max())
    assert k.asymmetry < tolerance
    s = lnp.spectrum(model, batch, loss, steps=flat.size, probes=2, estimator="exact", **options)
    measure_is(s, theta, flat, SPECTRAL[dtype])
    assert [d.chi_pos, k.chi_pos, s.chi_pos] == pytest.approx([position] * 3, rel=tolerance)
    assert s.moment_error < tolerance
    assert s.notes == ()
    density_is(s.density, model, batch, loss, theta, SPECTRAL[dtype], options)
    operators_are(model, batch, loss, j, tolerance, options)
    return s


def measure_is(s, theta, flat, tolerance):
    """Every eigenvalue that carries weight has its node, with that weight; the moments are the dense ones."""
    values, vectors = np.linalg.eigh(theta)
    values, weights = values / values[-1], (vectors.T @ flat) ** 2 / (flat @ flat)
    nodes = s.eigenvalues * (1 / np.linalg.norm(theta, 2))
    for order in range(1, 6):
        assert s.weights @ nodes**order == pytest.approx(weights @ values**order, rel=tolerance)
    gaps = np.minimum(np.diff(values, prepend=-1), np.diff(values, append=2))
    seen = (weights > 1e-3) & (values > 0.01) & (gaps > 100 * tolerance)
    assert seen.sum() > 3
    for value, weight in zip(values[seen], weights[seen], strict=True):
        nearest = np.argmin(np.abs(nodes - value))
        assert nodes[nearest] == pytest.approx(value, abs=tolerance)
        assert s.weights[nearest] == pytest.approx(weight, abs=10 * tolerance)


def density_is(density, model, batch, loss, theta, tolerance, options):
    """The quadratic forms of the record's own signs."""
    lin = lnp.load(framework_of(model)).linearize(model, batch, lnp.Options(loss, split=False, **options))
    for index in range(2):
        v = np.asarray(lin.signs(index), float).reshape(-1)
        expected = [v @ np.linalg.matrix_power(theta, order) @ v / v.size for order in (1, 2, 3)]
        found = [density.weights[index] @ density.nodes[index] ** order for order in (1, 2, 3)]
        assert found == pytest.approx(expected, rel=10 * tolerance)


def operators_are(model, batch, loss, j, tolerance, options):
    """Theta and J on vectors, and J^T's adjoint; columns in any order of the parameters."""
    rng = np.random.default_rng(0)
    theta = lnp.linear_operator(model, batch, loss, **options)
    operator = lnp.linear_operator(model, batch, loss, which="jacobian", **options)
    v, u = rng.normal(size=theta.shape[0]), rng.normal(size=operator.shape[1])
    assert theta @ v == pytest.approx(j @ (j.T @ v), rel=tolerance, abs=tolerance * np.abs(j @ (j.T @ v)).max())
    assert operator.shape == j.shape
    pulled = operator.T @ v
    scale = np.abs(j.T @ v).max()
    assert np.sort(pulled) == pytest.approx(np.sort(j.T @ v), abs=10 * tolerance * scale)
    assert v @ (operator @ u) == pytest.approx(pulled @ u, rel=100 * tolerance)
    assert operator @ pulled == pytest.approx(theta @ v, abs=tolerance * np.abs(theta @ v).max() * 10)


def framework_of(model):
    """The import name of the model's framework, from the backend that takes it."""
    from lnp.contract.registry import find

    return {"lnp_keras": "keras", "lnp_torch": "torch", "lnp_jax": "jax", "lnp_tensorflow": "tensorflow"}[
        find(model).__name__
    ]
