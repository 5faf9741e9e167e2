"""SciPy operators and the trace estimators that use them, against explicit Jacobians."""

import itertools
import sys

import numpy as np
import pytest
from scipy.sparse.linalg import eigsh, svds

import lnp
import lnp_numpy
from lnp.spectral import deflation, operators
from lnp.spectral.eager import to_numpy

X = np.random.default_rng(0).normal(size=(5, 4))
WEIGHT, BIAS = np.random.default_rng(1).normal(size=(4, 3)), np.zeros(3)
MODEL, BATCH = lnp_numpy.LinearModel(WEIGHT, BIAS), (X, np.array([0, 1, 2, 0, 1]))
JACOBIAN = np.concatenate([np.kron(X, np.eye(3)), np.kron(np.ones((5, 1)), np.eye(3))], axis=1)
THETA = JACOBIAN @ JACOBIAN.T


def test_kernel_and_jacobian():
    theta = lnp.linear_operator(MODEL, BATCH)
    j = lnp.linear_operator(MODEL, BATCH, which="jacobian")
    assert (theta.shape, j.shape) == (THETA.shape, JACOBIAN.shape)
    assert theta @ np.eye(15) == pytest.approx(THETA, abs=1e-12)
    assert theta.T @ np.eye(15) == pytest.approx(THETA, abs=1e-12)
    assert j @ np.eye(15) == pytest.approx(JACOBIAN, abs=1e-12)
    assert j.T @ np.eye(15) == pytest.approx(JACOBIAN.T, abs=1e-12)
    assert eigsh(theta, k=2, return_eigenvectors=False) == pytest.approx(np.linalg.eigvalsh(THETA)[-2:], rel=1e-8)
    largest = svds(j, k=1, return_singular_vectors=False)
    assert largest == pytest.approx(np.linalg.norm(JACOBIAN, 2), rel=1e-8)


def test_some_parameters():
    j = lnp.linear_operator(MODEL, BATCH, which="jacobian", parameters="bias")
    assert j @ np.eye(3) == pytest.approx(JACOBIAN[:, 12:])
    assert j.T @ np.eye(15) == pytest.approx(JACOBIAN[:, 12:].T)


@pytest.mark.parametrize("which", ["kernel", "jacobian"])
def test_samples_are_not_taken_apart_which_nothing_needs(which, monkeypatch):
    asked = []
    plain = operators.linearize
    monkeypatch.setattr(operators, "linearize", lambda *given: asked.append(given[-1]) or plain(*given))
    lnp.linear_operator(MODEL, BATCH, which=which)
    assert [(options.split, options.population) for options in asked] == [(False, False)]


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match="which is 'hessian'"):
        lnp.linear_operator(MODEL, BATCH, which="hessian")
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match=r"pip install 'lnp\[spectrum\]'"):
        lnp.linear_operator(MODEL, BATCH)


def test_values_on_another_device():
    """Whose arrays do not turn into NumPy's by themselves."""

    class Remote:
        def __array__(self, dtype=None, copy=None):
            raise TypeError("not on the host")

        def to_device(self, device, /, *, stream=None):
            assert device == "cpu"
            return np.array([1.0, 2.0], "float32")

    values = to_numpy(Remote())
    assert (values.tolist(), values.dtype) == ([1, 2], np.float64)


def decaying(size=40, rate=0.7, seed=0):
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    return (q * rate ** np.arange(size)) @ q.T


def defined_hutch(a, sketch, probes):
    """The estimator as its definition reads."""
    q = np.linalg.qr(a @ sketch)[0]
    p = np.eye(len(a)) - q @ q.T
    values = np.array([g @ p @ a @ p @ g for g in probes.T])
    return np.trace(q.T @ a @ q) + values.mean(), values.std(ddof=1) / len(values) ** 0.5


def defined_xtrace(a, omega):
    values = []
    for i in range(omega.shape[1]):
        q = np.linalg.qr(a @ np.delete(omega, i, axis=1))[0]
        p = np.eye(len(a)) - q @ q.T
        values.append(np.trace(q.T @ a @ q) + omega[:, i] @ p @ a @ p @ omega[:, i])
    return np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5


@pytest.mark.parametrize("products", [6, 13, 30])
def test_the_estimators_are_their_definitions(products):
    a, size = decaying(), 40
    generator = np.random.default_rng(7)
    signs = [2.0 * generator.integers(0, 2, size=(size, products // 3)) - 1 for _ in range(2)]
    found = lnp.hutch_plus_plus(a, products, seed=7)
    assert found[:2] == pytest.approx(defined_hutch(a, *signs), rel=1e-9)
    assert found.products == products // 3 * 3
    omega = np.random.default_rng(7).standard_normal((size, products // 2))
    found = lnp.xtrace(a, products, seed=7)
    assert found[:2] == pytest.approx(defined_xtrace(a, omega), rel=1e-9)
    assert found.products == products // 2 * 2


def test_the_tail_is_unbiased_over_all_signs():
    """With the sketch held, the mean over every pair of probes is the trace: no statistics."""
    a = decaying(4)
    every = [np.array(s) for s in itertools.product((-1.0, 1.0), repeat=4)]
    drawn = iter([np.stack([every[1], every[6]], axis=1), np.stack(every, axis=1)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deflation, "_signs", lambda *_: next(drawn))
        assert lnp.hutch_plus_plus(a, 6).value == pytest.approx(np.trace(a), rel=1e-10)


@pytest.mark.parametrize("estimator", [lnp.hutch_plus_plus, lnp.xtrace])
def test_unbiased_within_their_errors(estimator):
    """60 seeds; four standard errors of their mean, and errors of the right size."""
    a = decaying(rate=0.95)
    found = [estimator(a, 24, seed=seed) for seed in range(60)]
    values, errors = np.array([f.value for f in found]), np.array([f.stderr for f in found])
    spread = values.std(ddof=1)
    assert abs(values.mean() - np.trace(a)) < 4 * spread / 60**0.5
    assert 0.5 < np.sqrt(np.mean(errors**2)) / spread < 2


@pytest.mark.parametrize("estimator", [lnp.hutch_plus_plus, lnp.xtrace])
def test_low_rank_is_exact(estimator):
    b = np.random.default_rng(0).normal(size=(40, 3))
    found = estimator(b @ b.T, 24)
    assert found.value == pytest.approx(np.trace(b @ b.T), rel=1e-9)
    assert found.stderr < 1e-9 * found.value


@pytest.mark.parametrize("estimator", [lnp.hutch_plus_plus, lnp.xtrace])
def test_bad_operators(estimator):
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        estimator(np.ones((2, 3)))
    with pytest.raises(ValueError, match="products is 3"):
        estimator(np.eye(50), 3)


@pytest.mark.parametrize("estimator", [lnp.hutch_plus_plus, lnp.xtrace])
def test_of_a_network(estimator):
    theta = lnp.linear_operator(MODEL, BATCH)
    d = lnp.decompose(MODEL, BATCH, estimator="exact")
    found = estimator(theta, 60)
    assert found.value == pytest.approx(d.chi_net * d.loss_terms, rel=1e-10)
    assert (found.stderr, found.products) == (0, 15)
