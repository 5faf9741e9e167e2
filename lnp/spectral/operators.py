"""Kernel and Jacobian as SciPy `LinearOperator`s, for every solver that takes one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lnp.contract.linearization import Array, Linearization, Vector, accumulation_dtype
from lnp.contract.options import Options
from lnp.spectral.eager import once, record, to_numpy

KINDS = ("kernel", "jacobian")


def linear_operator(
    model: Any,
    batch: Any,
    loss: str | Callable | None = None,
    *,
    which: str = "kernel",
    forward: Callable | None = None,
    parameters: Any = None,
    batch_statistics: str = "frozen",
) -> Any:
    r"""Theta or J of a batch as a `scipy.sparse.linalg.LinearOperator`. Needs SciPy: pip install 'lnp[spectrum]'.

        which="kernel"      Theta = J J^T, shape (N K, N K), symmetric
        which="jacobian"    J, shape (N K, P)

    Rows run over samples, then outputs; columns over the parameters in the order of their names, each flattened. Arrays
    come and go as NumPy's; the products are the framework's, on the model's device, around the parameters as they are
    now. The operator keeps the forward pass alive: delete it to free that memory.

    Parameters
    ----------
    model, batch, loss, forward, parameters, batch_statistics:
        As for `lnp.decompose`.

    Raises
    ------
    ImportError
        If SciPy is not installed.
    TypeError
        If the backend has no Jacobian-vector products.
    ValueError
        For an unknown `which`, and where `decompose` raises it.

    Examples
    --------
    >>> import numpy, lnp, lnp_numpy
    >>> from scipy.sparse.linalg import eigsh
    >>> x = numpy.diag([3.0, 2.0, 1.0])
    >>> model = lnp_numpy.LinearModel(weight=numpy.zeros((3, 1)))
    >>> theta = lnp.linear_operator(model, (x, numpy.ones((3, 1))))
    >>> eigsh(theta, k=1, return_eigenvectors=False, v0=numpy.ones(3)).round(9).tolist()
    [9.0]
    """
    if which not in KINDS:
        raise ValueError(f"which is {which!r}. Expected one of {', '.join(map(repr, KINDS))}.")
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise ImportError(
            "lnp.linear_operator needs SciPy, which is not installed: pip install 'lnp[spectrum]'"
        ) from error
    options = Options(loss, forward, parameters, batch_statistics=batch_statistics, split=False, population=False)
    lin = record(model, batch, options)
    assert lin.jvp is not None, "record() looks for it"
    jvp, size = lin.jvp, math.prod(lin.outputs.shape)
    if which == "kernel":
        apply = once(lin, lambda v: jvp(lin.vjp(v)))
        product = lambda v: to_numpy(apply(_cotangent(lin, v))).reshape(-1)
        return LinearOperator((size, size), matvec=product, rmatvec=product, dtype=np.float64)
    space = _Space(lin)
    return LinearOperator(
        (size, space.size),
        matvec=lambda u: to_numpy(jvp(space.vector(u))).reshape(-1),
        rmatvec=lambda v: space.flat(lin.vjp(_cotangent(lin, v))),
        dtype=np.float64,
    )


def _cotangent(lin: Linearization, v: np.ndarray) -> Array:
    """A NumPy vector as the framework's (N, K)."""
    return _like(lin, np.reshape(np.asarray(v), lin.outputs.shape), lin.outputs)


def _like(lin: Linearization, values: np.ndarray, array: Array) -> Array:
    # a copy: the array is the framework's own, and may be kept
    return lin.xp.asarray(np.array(values), dtype=array.dtype, device=getattr(array, "device", None))


class _Space:
    """A backend's vectors in parameter space as flat NumPy vectors."""

    def __init__(self, lin: Linearization) -> None:
        self._lin, zero = lin, lin.vjp(lin.xp.zeros_like(lin.outputs))
        self._names = list(lin.inner_products(zero, zero))
        self._named = isinstance(zero, Mapping)
        self._parts = [zero[name] for name in self._names] if self._named else list(zero)
        self._sizes = [math.prod(part.shape) for part in self._parts]
        self.size = sum(self._sizes)

    def flat(self, vector: Vector) -> np.ndarray:
        """All parts after one another, shape (P,)."""
        parts = [vector[name] for name in self._names] if self._named else vector
        return np.concatenate([to_numpy(self._wide(part)).reshape(-1) for part in parts])

    def _wide(self, part: Array) -> Array:
        """In float32 or better: NumPy has no bfloat16."""
        xp = self._lin.xp
        return xp.astype(part, accumulation_dtype(xp, part.dtype), copy=False)

    def vector(self, flat: np.ndarray) -> Vector:
        """The backend's vector with these entries."""
        pieces = np.split(np.asarray(flat).reshape(-1), np.cumsum(self._sizes)[:-1])
        parts = [
            _like(self._lin, piece.reshape(tuple(part.shape)), part)
            for piece, part in zip(pieces, self._parts, strict=True)
        ]
        return dict(zip(self._names, parts, strict=True)) if self._named else parts
