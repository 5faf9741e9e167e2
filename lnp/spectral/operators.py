"""Kernel and Jacobian as SciPy `LinearOperator`s, for every solver that takes one."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np

from lnp.api import decompose
from lnp.arguments import Batch, Forward, Loss, Model, Parameters
from lnp.contract.linearization import Array, Linearization, Vector, accumulation_dtype, device_of
from lnp.contract.options import BatchStatistics, Options
from lnp.optional import import_optional
from lnp.parameter_texts import parameters_of
from lnp.spectral.eager import compile_products, linearize, to_numpy

Operator = Literal["kernel", "jacobian"]
OPERATORS: tuple[str, ...] = get_args(Operator)


@parameters_of(decompose)
def linear_operator(
    model: Model,
    batch: Batch,
    loss: Loss = None,
    *,
    which: Operator = "kernel",
    forward: Forward = None,
    parameters: Parameters = None,
    batch_statistics: BatchStatistics = "frozen",
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
    if which not in OPERATORS:
        raise ValueError(f"which is {which!r}. Expected one of {', '.join(map(repr, OPERATORS))}.")
    linalg = import_optional("scipy.sparse.linalg", "lnp.linear_operator", install="'lnp[spectrum]'", library="SciPy")
    options = Options(loss, forward, parameters, batch_statistics=batch_statistics, split=False, population=False)
    lin = linearize(model, batch, options)
    assert lin.jvp is not None, "linearize() looks for it"
    jvp = lin.jvp
    size = math.prod(lin.outputs.shape)
    if which == "jacobian":
        space = _ParameterSpace(lin)
        return linalg.LinearOperator(
            (size, space.size),
            matvec=lambda u: to_numpy(jvp(space.vector(u))).reshape(-1),
            rmatvec=lambda v: space.flat(lin.vjp(_cotangent(lin, v))),
            dtype=np.float64,
        )
    theta = compile_products(lin, lambda v: jvp(lin.vjp(v)))

    def product(v: np.ndarray) -> np.ndarray:
        return to_numpy(theta(_cotangent(lin, v))).reshape(-1)

    return linalg.LinearOperator((size, size), matvec=product, rmatvec=product, dtype=np.float64)


def _cotangent(lin: Linearization, v: np.ndarray) -> Array:
    """A NumPy vector as the framework's (N, K)."""
    return _like(lin, np.reshape(np.asarray(v), lin.outputs.shape), lin.outputs)


def _like(lin: Linearization, values: np.ndarray, array: Array) -> Array:
    """The values as an array of the framework, of the dtype and on the device of another one."""
    # a copy: the array is the framework's own, and may be kept
    return lin.xp.asarray(np.array(values), dtype=array.dtype, device=device_of(array))


class _ParameterSpace:
    """Vectors in parameter space as flat NumPy vectors, shape (P,)."""

    def __init__(self, lin: Linearization) -> None:
        self._lin = lin
        zero = lin.vjp(lin.xp.zeros_like(lin.outputs))
        self._zero = {name: zero[name] for name in lin.inner_products(zero, zero)}  # in the record's order of names
        self._sizes = [math.prod(part.shape) for part in self._zero.values()]
        self.size = sum(self._sizes)

    def flat(self, vector: Vector) -> np.ndarray:
        """All parts after one another, shape (P,)."""
        xp = self._lin.xp
        # NumPy has no bfloat16
        wide = [xp.astype(vector[n], accumulation_dtype(xp, vector[n].dtype), copy=False) for n in self._zero]
        return np.concatenate([to_numpy(part).reshape(-1) for part in wide])

    def vector(self, flat: np.ndarray) -> Vector:
        """{parameter name: array} with these entries."""
        pieces = np.split(np.asarray(flat).reshape(-1), np.cumsum(self._sizes)[:-1])
        return {
            name: _like(self._lin, piece.reshape(tuple(part.shape)), part)
            for (name, part), piece in zip(self._zero.items(), pieces, strict=True)
        }
