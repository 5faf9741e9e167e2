r"""What kernel matrices are compared by: alignment, entropy, effective rank, velocity.

Every function takes matrices of shape (..., M, M), or an `lnp.Kernel`, and gives one number for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

ROUNDING = 1e-12
"""Eigenvalues below this share of the largest are rounding, and count as zero."""


class HasMatrix(Protocol):
    """What `lnp.kernel` returns, and anything else with a matrix of shape (..., M, M)."""

    @property
    def matrix(self) -> np.ndarray:
        """The matrix."""


KernelLike: TypeAlias = "HasMatrix | ArrayLike"
"""A kernel, or what NumPy turns into an array of square matrices."""


def alignment(a: KernelLike, b: KernelLike, *, centered: bool = False) -> Any:
    r"""How alike two kernels are, whatever their scale.

        A(a, b) = <a, b>_F / (||a||_F ||b||_F)        in [0, 1] for positive semi-definite matrices

    With `centered`, of H a H and H b H with H = 1 - 1 1^T / M: what remains when the features' mean is taken out.

    Source: Cristianini, Shawe-Taylor, Elisseeff, Kandola, NIPS 2001; centred: Cortes, Mohri, Rostamizadeh, arXiv
    1203.0550.

    Raises
    ------
    ValueError
        For matrices that are not square or not of one size.

    >>> round(alignment(np.eye(2), np.ones((2, 2))), 6), alignment(np.eye(2), 3 * np.eye(2))
    (0.707107, 1.0)
    """
    first, second = _matrix(a), _matrix(b)
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(
            f"The kernels have shapes {first.shape} and {second.shape}. Expected one number of rows: the same batch "
            "and the same kind."
        )
    if centered:
        first, second = _centered(first), _centered(second)
    return _number(_ratio(_inner(first, second), np.sqrt(_inner(first, first) * _inner(second, second))))


def target_alignment(kernel: KernelLike, targets: ArrayLike, *, centered: bool = False) -> Any:
    r"""How well a kernel is suited to the targets: its alignment with Y Y^T.

        <Theta, Y Y^T>_F / (||Theta||_F ||Y Y^T||_F)

    Y holds the targets' rows, (N, K), against a kernel per class or traced over outputs; all N K values are one column
    against a full kernel. Integer labels become one-hot rows.

    Raises
    ------
    ValueError
        If the targets are neither as many as the kernel's rows nor rows of as many values.

    >>> round(target_alignment(np.array([[1.0, 1.0], [1.0, 1.0]]), [0, 0]), 6)
    1.0
    """
    matrix = _matrix(kernel)
    rows = np.asarray(targets)
    if np.issubdtype(rows.dtype, np.integer) and rows.ndim == 1:
        outputs = max(int(rows.max(initial=0)) + 1, matrix.shape[-1] // max(rows.size, 1))
        rows = (rows[:, None] == np.arange(outputs)).astype(float)
    rows = rows.reshape(rows.shape[0], -1).astype(float)
    if matrix.shape[-1] == rows.size:
        rows = rows.reshape(-1, 1)
    if matrix.shape[-1] != rows.shape[0]:
        raise ValueError(
            f"The kernel has {matrix.shape[-1]} rows, the targets have shape {np.shape(targets)}. Expected one target "
            "for each sample, or for each output of each sample. Check that batch and kernel belong together."
        )
    return alignment(matrix, rows @ rows.T, centered=centered)


def entropy(kernel: KernelLike) -> Any:
    r"""Von Neumann entropy of the spectrum, in nats: how many modes share the kernel.

        S = -sum_i p_i log p_i,   p_i = lambda_i / tr Theta        in [0, log M]

    Source: as a collective variable of training: Tovey, Krippendorf, Nikolaou, Holm, arXiv 2305.00995.

    >>> round(entropy(np.eye(4)), 6)  # log 4
    1.386294
    """
    p = _shares(_matrix(kernel))
    logs = np.log(np.where(p > 0, p, 1.0))  # p log p is 0 for p = 0; p is nan where the trace is zero
    return _number(np.abs(np.sum(p * logs, axis=-1)))


def effective_rank(kernel: KernelLike) -> Any:
    """exp(entropy), between 1 (one mode) and M (all modes alike).

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.

    >>> round(effective_rank(np.eye(4)), 6)
    4.0
    """
    return _number(np.exp(entropy(kernel)))


def participation_ratio(kernel: KernelLike) -> Any:
    """(sum_i lambda_i)^2 / sum_i lambda_i^2 = (tr Theta)^2 / ||Theta||_F^2, between 1 and M. Needs no eigenvalues.

    >>> participation_ratio(np.eye(4))
    4.0
    """
    matrix = _matrix(kernel)
    return _number(_ratio(np.trace(matrix, axis1=-2, axis2=-1) ** 2, _inner(matrix, matrix)))


@dataclass(frozen=True)
class KernelVelocity:
    """How far a kernel went between two points of a run; numbers, or shape (K,) per class.

    Attributes
    ----------
    distance:
        ||after - before||_F / ||before||_F: growth and rotation.
    rotation:
        1 - alignment(before, after), in [0, 1]: rotation alone.
    interval:
        Time or steps between the two points, in the user's unit.
    """

    distance: Any
    rotation: Any
    interval: float

    @property
    def speed(self) -> Any:
        """distance / interval."""
        return self.distance / self.interval

    @property
    def rotation_speed(self) -> Any:
        """rotation / interval, the kernel velocity of arXiv 2010.15110."""
        return self.rotation / self.interval


def kernel_velocity(before: KernelLike, after: KernelLike, *, interval: float = 1.0) -> KernelVelocity:
    """How fast the kernel of one batch moves between two points of a run.

    Source: Fort, Dziugaite, Paul, Kharaghani, Roy, Ganguli, "Deep learning versus kernel learning", arXiv 2010.15110.

    Raises
    ------
    ValueError
        For an interval that is not positive, and for kernels of different sizes.

    >>> kernel_velocity(np.eye(2), 3 * np.eye(2), interval=2.0)
    KernelVelocity(distance=2.0, rotation=0.0, interval=2.0)
    """
    if not interval > 0:
        raise ValueError(f"interval is {interval}. Expected the time or the steps between the two kernels, > 0.")
    first, second = _matrix(before), _matrix(after)
    rotation = 1 - np.asarray(alignment(first, second))
    change = second - first
    distance = np.sqrt(_ratio(_inner(change, change), _inner(first, first)))
    return KernelVelocity(_number(distance), _number(rotation), interval)


def _matrix(kernel: KernelLike) -> np.ndarray:
    """The kernel's matrix in float64, shape (..., M, M)."""
    matrix = np.asarray(getattr(kernel, "matrix", kernel), dtype=float)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"The kernel has shape {matrix.shape}. Expected square matrices, or the result of lnp.kernel.")
    return matrix


def _shares(matrix: np.ndarray) -> np.ndarray:
    """lambda_i / tr Theta, without the eigenvalues that are rounding."""
    values = np.linalg.eigvalsh(matrix)
    values = np.where(values > ROUNDING * values[..., -1:], values, 0.0)
    return _ratio(values, np.sum(values, axis=-1, keepdims=True))


def _centered(matrix: np.ndarray) -> np.ndarray:
    means = matrix - matrix.mean(axis=-1, keepdims=True)
    return means - means.mean(axis=-2, keepdims=True)


def _inner(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sum(a * b, axis=(-1, -2))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, and nan for a denominator of zero without a warning."""
    return numerator / np.where(denominator == 0, math.nan, denominator)


def _number(values: np.ndarray | np.number) -> Any:
    """A float where there is one value."""
    return float(values) if np.ndim(values) == 0 else np.asarray(values)
