r"""Lanczos tridiagonalisation with full reorthogonalisation, and the Gauss quadrature that it stands for.

For a symmetric operator A with eigenpairs (lambda_i, u_i) and a start q_1 of length one, m steps give an orthonormal
basis Q of the Krylov space and the tridiagonal T = Q^T A Q. With T = S diag(theta) S^T,

    nodes theta_j (the Ritz values),   weights tau_j = S[1, j]^2,   sum_j tau_j = 1

are the m-point Gauss quadrature of the measure sum_i <u_i, q_1>^2 delta(lambda_i): its moments 0 to 2m - 1 are exact.
The distance of theta_j from an eigenvalue is at most the residual beta_m |S[m, j]|.

Each new direction is orthogonalised against all earlier ones, twice, which keeps the basis orthogonal to rounding: no
eigenvalue appears a second time. That takes the memory of m vectors.

Source: Golub and Welsch, Math. Comp. 23 (1969), doi:10.1090/S0025-5718-69-99647-1; twice is enough: Giraud, Langou,
Rozloznik, van den Eshof, Numer. Math. 101 (2005), doi:10.1007/s00211-005-0615-4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lnp.contract.linearization import Array, Linearization, Namespace, accumulation_dtype, device_of

PASSES = 2
"""Orthogonalisations of each new direction."""
BREAKDOWN = 32.0
"""In units of eps times the largest entry of T: what is left of a direction inside the space already spanned."""


class Tridiagonal(NamedTuple):
    """T = Q^T A Q, as arrays of the framework.

    Attributes
    ----------
    diagonal:
        (m,); zero beyond `size`.
    off_diagonal:
        (m,); entry j couples the directions j and j + 1. The last one of `size` is what the residuals are taken from,
        and zero where the start's Krylov space is spanned.
    size:
        Number of steps taken: fewer than m where the start lies in an invariant subspace, which then is spanned.
    """

    diagonal: Array
    off_diagonal: Array
    size: int | Array


def tridiagonalize(lin: Linearization, start: Array, steps: int) -> Tridiagonal:
    """`steps` Lanczos steps on v -> J (J^T v) from `start`, shape (N, K). Pure, safe to trace and compile.

    The loop is the record's own, so that it compiles once for any number of steps; memory is that of `steps` outputs.
    """
    assert lin.jvp is not None, "the caller looks for it"
    xp, jvp = lin.xp, lin.jvp
    shape = lin.outputs.shape
    wide = accumulation_dtype(xp, lin.outputs.dtype)
    rows = xp.arange(steps, device=device_of(lin.outputs))
    tolerance = BREAKDOWN * float(xp.finfo(lin.outputs.dtype).eps)

    def theta(q: Array) -> Array:
        v = xp.astype(xp.reshape(q, shape), lin.outputs.dtype, copy=False)
        return xp.astype(xp.reshape(jvp(lin.vjp(v)), (-1, 1)), wide, copy=False)

    def body(state: tuple) -> tuple:
        j, _, q, basis, diagonal, off_diagonal, scale = state
        basis = xp.where(rows[:, None] == j, xp.reshape(q, (1, -1)), basis)
        w = theta(q)
        alpha = xp.sum(q * w)
        for _ in range(PASSES):
            w = w - xp.reshape(xp.reshape(basis @ w, (1, -1)) @ basis, (-1, 1))
        beta = xp.sqrt(xp.sum(w * w))
        # T is positive semi-definite, as Theta is: its largest entry is on the diagonal
        scale = xp.where(alpha > scale, alpha, scale)
        # what rounding leaves of a direction inside of the space is no new direction: T ends there
        outside = beta > tolerance * scale
        beta = xp.where(outside, beta, xp.zeros_like(beta))
        diagonal = xp.where(rows == j, alpha, diagonal)
        off_diagonal = xp.where(rows == j, beta, off_diagonal)
        return j + 1, outside, _unit(xp, w, beta), basis, diagonal, off_diagonal, scale

    first = xp.astype(xp.reshape(start, (-1, 1)), wide, copy=False)
    norm = xp.sqrt(xp.sum(first * first))
    q = _unit(xp, first, norm)
    basis = xp.zeros((steps, q.shape[0]), dtype=wide, device=device_of(lin.outputs))
    entries = basis[:, 0]
    # rows[0] == 0 is a True of the framework: compiled loops keep the types of their state
    state = (0, rows[0] == 0, q, basis, entries, entries, xp.zeros_like(norm))
    size, _, _, _, diagonal, off_diagonal, _ = lin.while_loop(lambda s: (s[0] < steps) & s[1], body, state)
    return Tridiagonal(diagonal, off_diagonal, size)


def _unit(xp: Namespace, vector: Array, norm: Array) -> Array:
    """The vector at length one; zero stays zero."""
    return vector / xp.where(norm == 0, xp.ones_like(norm), norm)


@dataclass(frozen=True)
class Quadrature:
    """The Gauss quadrature of a measure on the eigenvalues, from the largest node to the smallest.

    Attributes
    ----------
    nodes:
        theta, shape (m,).
    weights:
        tau >= 0, shape (m,), of sum 1.
    residuals:
        Each node lies within this distance of an eigenvalue, shape (m,).
    """

    nodes: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray


def quadrature(diagonal: Sequence[float], off_diagonal: Sequence[float], size: int) -> Quadrature:
    """Nodes and weights from the first `size` entries of T; nan where T is not finite.

    >>> q = quadrature([1.0, 1.0], [1.0, 0.0], 2)
    >>> q.nodes.round(12).tolist(), q.weights.round(12).tolist()
    ([2.0, 0.0], [0.5, 0.5])
    """
    alpha = np.asarray(diagonal[:size], dtype=float)
    beta = np.asarray(off_diagonal[:size], dtype=float)
    if not (np.all(np.isfinite(alpha)) and np.all(np.isfinite(beta))):
        return Quadrature(*(np.full(size, math.nan) for _ in range(3)))
    lower = np.diag(alpha) + np.diag(beta[:-1], -1)  # the triangle that eigh reads
    nodes, vectors = np.linalg.eigh(lower)
    falling = slice(None, None, -1)
    return Quadrature(nodes[falling], vectors[0, falling] ** 2, beta[-1] * abs(vectors[-1, falling]))
