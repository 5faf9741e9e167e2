"""Loss gradients that leave their measurement, one batch at a time, and the products between them.

Held in NumPy on the host: m gradients of P parameters take m P numbers there, the device never holds more than one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import array_api_compat
import numpy as np

from lnp.arguments import Batch, Model
from lnp.contract.gradient_pass import gradient
from lnp.contract.linearization import Array, Linearization, Vector, accumulation_dtype, valid
from lnp.contract.options import Options
from lnp.contract.registry import evaluate
from lnp.results.decomposition import Decomposition

COMPILED = (
    "Gradients of several losses or batches were asked for inside of a compiled function. Expected a call outside of "
    "one: they are held in NumPy between the batches. Call it before or after the compiled function."
)


@dataclass(frozen=True)
class LossGradient:
    """grad L of one batch, as grad L / m, whose squares stay in the range of numbers.

    Attributes
    ----------
    loss:
        L.
    magnitude:
        m.
    vector:
        {parameter name: array of its shape}, grad L / m, in float32 or better.
    decomposition:
        Of the same batch, up to what `lnp.results.finished` does with it; None where it was not asked for.
    notes:
        What the user should know.
    weight:
        What the batch weighs in a mean over several: its number of terms, or the sum of their weights; of a part alone.
    """

    loss: Any
    magnitude: Any
    vector: Vector
    decomposition: Decomposition | None = None
    notes: tuple[str, ...] = ()
    weight: Any = None


def loss_gradient(lin: Linearization) -> LossGradient:
    """The gradient of a record's loss. Pure, safe to trace and compile."""
    vector, magnitude = gradient(lin)
    return LossGradient(lin.loss, valid(lin, magnitude), widened(lin, vector), notes=lin.notes)


def widened(lin: Linearization, vector: Vector) -> Vector:
    """A vector in float32 or better."""
    xp = lin.xp
    return {name: xp.astype(part, accumulation_dtype(xp, part.dtype), copy=False) for name, part in vector.items()}


def evaluate_gradient(computation: Callable, model: Model, batch: Batch, options: Options) -> LossGradient:
    """What a computation of a `LossGradient` makes of a batch, with the vector on the host.

    Raises
    ------
    TypeError
        Inside of a compiled function, where arrays have no value yet.
    """
    found = evaluate(computation, model, (batch,), options)
    if not isinstance(found.loss, float):
        raise TypeError(COMPILED)
    return replace(found, vector={name: _to_host(part) for name, part in found.vector.items()})


def inner_product(u: np.ndarray, w: np.ndarray) -> float:
    """<u, w> in float64, converted piece by piece: a copy of the vectors would take twice their memory."""
    return float(np.einsum("i,i->", np.ravel(u), np.ravel(w), dtype=np.float64))


def products(gradients: Sequence[LossGradient]) -> np.ndarray:
    """<u_a, u_b> of all pairs of gradients divided by their magnitudes, u = grad L / m, summed in float64. (m, m)."""
    count = len(gradients)
    matrix = np.zeros((count, count))
    for a, b in itertools.combinations_with_replacement(range(count), 2):
        u, w = gradients[a].vector, gradients[b].vector
        matrix[a, b] = matrix[b, a] = sum(inner_product(u[name], w[name]) for name in u)
    return matrix


def _to_host(array: Array) -> np.ndarray:
    try:
        return np.asarray(array)
    except TypeError:  # on another device, in a framework that does not copy from there by itself
        return np.asarray(array_api_compat.to_device(array, "cpu"))
