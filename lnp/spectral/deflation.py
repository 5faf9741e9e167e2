r"""Trace estimators that take out the head of the spectrum first: for eigenvalues that decay, and many products.

With Q an orthonormal basis of what A makes of random vectors, tr A = tr(Q^T A Q) + tr((1 - Q Q^T) A (1 - Q Q^T)): the
first is exact, and only the tail is left to chance. At k products the error falls as 1/k instead of 1/sqrt(k), or
faster where eigenvalues decay. A product with Theta costs a Jacobian-vector product beside the vector-Jacobian product
that `lnp.decompose` is content with, so these pay for kernels with a dominant head from some 30 products on.

Source: Meyer, Musco, Musco, Woodruff, "Hutch++", arXiv 2010.09649; Epperly, Tropp, Webber, "XTrace", arXiv 2301.07825.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from lnp.parameter_texts import parameters_of

Products = Callable[[np.ndarray], np.ndarray]
"""Columns (M, k) -> A times each of them."""


class SymmetricOperator(Protocol):
    """A symmetric matrix of shape (M, M) by its products with columns, such as a SciPy `LinearOperator`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(M, M)."""

    def __matmul__(self, columns: Any, /) -> Any:
        """The products with columns, (M, k)."""


class Trace(NamedTuple):
    """An estimated trace: its value, standard error, and the products with the operator that it took."""

    value: float
    stderr: float
    products: int


def hutch_plus_plus(operator: SymmetricOperator, products: int = 60, *, seed: int = 0) -> Trace:
    r"""tr A of a symmetric operator, unbiased: a third of the products each for sketch, head and tail.

        tr(Q^T A Q) + 1/k sum_j g_j^T (1 - Q Q^T) A (1 - Q Q^T) g_j,   Q = orth(A S),   signs S and g_j

    Parameters
    ----------
    operator:
        Symmetric, of shape (M, M): a SciPy `LinearOperator` such as `lnp.linear_operator(model, batch)`, or a matrix.
    products:
        The most products with vectors to spend, at least 6. 3 M and more give the exact trace by M products.
    seed:
        Seed of the random signs.

    Raises
    ------
    ValueError
        For an operator that is not square, and for too few products.

    Examples
    --------
    >>> hutch_plus_plus(np.diag([3.0, 2.0, 1.0]), 9)
    Trace(value=6.0, stderr=0.0, products=3)
    """

    def traces(apply: Products, size: int, third: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        sketch = _signs(generator, size, third)
        probes = _signs(generator, size, third)
        q = np.linalg.qr(apply(sketch))[0]
        tail = probes - q @ (q.T @ probes)
        return np.sum(q * apply(q)) + np.sum(tail * apply(tail), axis=0)

    return _estimate(operator, products, 3, traces)


@parameters_of(hutch_plus_plus)
def xtrace(operator: SymmetricOperator, products: int = 60, *, seed: int = 0) -> Trace:
    r"""tr A of a symmetric operator, unbiased: each of k random vectors is the probe of the basis made of the others.

        tr_i = tr(Q_i^T A Q_i) + w_i^T (1 - Q_i Q_i^T) A (1 - Q_i Q_i^T) w_i,   Q_i = orth(A W without w_i)

    averaged over i. All Q_i lie in Q = orth(A W) and lack one direction of it, so that 2 k products are enough; the
    spread of the tr_i gives the standard error.

    Parameters
    ----------
    operator, seed:
        As for `hutch_plus_plus`.
    products:
        The most products to spend, at least 4.

    Raises
    ------
    ValueError
        For an operator that is not square, and for too few products.

    Examples
    --------
    >>> xtrace(np.diag([3.0, 2.0, 1.0]), 6)
    Trace(value=6.0, stderr=0.0, products=3)
    """

    def traces(apply: Products, size: int, count: int) -> np.ndarray:
        omega = np.random.default_rng(seed).standard_normal((size, count))
        q, r = np.linalg.qr(apply(omega))
        h = q.T @ apply(q)
        w = q.T @ omega
        # Q_i is Q without one direction, which is orthogonal to R without its column i
        missing = np.stack([_orthogonal(np.delete(r, i, axis=1)) for i in range(count)], axis=1)
        x = w - missing * np.sum(missing * w, axis=0)  # Q^T Q_i Q_i^T w_i
        head = np.trace(h) - np.sum(missing * (h @ missing), axis=0)
        return head + np.sum(w * r, axis=0) - 2 * np.sum(x * r, axis=0) + np.sum(x * (h @ x), axis=0)

    return _estimate(operator, products, 2, traces)


def _estimate(
    operator: SymmetricOperator, products: int, rounds: int, traces: Callable[[Products, int, int], np.ndarray]
) -> Trace:
    """The mean of k = products / rounds estimates, whose spread is the error; exact where all M columns cost no more.

    `traces(apply, M, k)` makes the k estimates of tr A, each with `rounds` products.
    """
    shape: tuple = tuple(getattr(operator, "shape", ()))
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(
            f"The operator has shape {shape}. Expected a square, symmetric one, such as "
            "lnp.linear_operator(model, batch)."
        )
    if products < 2 * rounds:
        raise ValueError(f"products is {products}. Expected at least {2 * rounds}.")
    size = int(shape[0])
    count = products // rounds

    def apply(columns: np.ndarray) -> np.ndarray:
        return np.asarray(operator @ columns, dtype=float)

    if count >= size:
        return Trace(float(np.trace(apply(np.eye(size)))), 0.0, size)
    estimates = traces(apply, size, count)
    return Trace(float(np.mean(estimates)), float(np.std(estimates, ddof=1)) / math.sqrt(count), rounds * count)


def _orthogonal(columns: np.ndarray) -> np.ndarray:
    """A unit vector orthogonal to the k - 1 columns of length k; of full rank or not."""
    return np.linalg.svd(columns)[0][:, -1]


def _signs(generator: np.random.Generator, size: int, count: int) -> np.ndarray:
    return 2.0 * generator.integers(0, 2, size=(size, count)) - 1.0
