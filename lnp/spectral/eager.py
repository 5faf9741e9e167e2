"""Records outside of a compiled computation: for dense kernels and for operators that are handed out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import array_api_compat
import numpy as np

from lnp.contract import registry
from lnp.contract.linearization import Array, Linearization
from lnp.contract.options import Options


def record(model: Any, batch: Any, options: Options) -> Linearization:
    """The record of a batch, with the checks on values made and with Jacobian-vector products.

    Raises
    ------
    TypeError
        If the backend has no Jacobian-vector products.
    ValueError
        If a check of the record fails.
    """
    lin = registry.find(model).linearize(model, batch, options)
    for flag, message in lin.violations:
        if bool(flag):
            raise ValueError(message)
    if lin.jvp is None:
        raise TypeError(
            "This model's backend has no Jacobian-vector products, which the kernel needs beside vector-Jacobian ones. "
            "Expected a record with jvp. lnp.decompose does without."
        )
    return lin


def to_numpy(array: Array) -> np.ndarray:
    """The values on the host, in float64."""
    try:
        return np.asarray(array, dtype=np.float64)
    except TypeError:  # on another device, in a framework that does not copy from there by itself
        return np.asarray(array_api_compat.to_device(array, "cpu"), dtype=np.float64)


def once(lin: Linearization, function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The function as one turn of the record's loop: compiled, and once for all calls, where the framework does that.

    It takes and gives arrays of shape (N, K).
    """

    def body(state: tuple) -> tuple:
        return state[0] + 1, state[1], function(state[1])

    def going(state: tuple) -> Any:
        return state[0] < 1

    return lambda v: lin.while_loop(going, body, (0, v, lin.xp.zeros_like(lin.outputs)))[2]


def rows(lin: Linearization, block: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows of Theta, shape (B, N, K)) for blocks of at most `block` rows, each row J (J^T e)."""
    assert lin.jvp is not None, "record() looks for it"
    jvp, xp, (samples, outputs) = lin.jvp, lin.xp, lin.outputs.shape
    size, device = samples * outputs, getattr(lin.outputs, "device", None)
    index = xp.reshape(xp.arange(size, device=device), (samples, outputs))
    within = xp.reshape(xp.arange(block, device=device), (block, 1, 1))
    empty = xp.zeros((block, samples, outputs), dtype=lin.outputs.dtype, device=device)

    def going(state: tuple) -> Any:
        start, i, _ = state
        return (i < block) & (start + i < size)

    def body(state: tuple) -> tuple:
        start, i, found = state
        row = jvp(lin.vjp(xp.astype(index == start + i, lin.outputs.dtype)))
        return start, i + 1, xp.where(within == i, xp.astype(row, found.dtype, copy=False)[None, :, :], found)

    for start in range(0, size, block):
        yield start, to_numpy(lin.while_loop(going, body, (start, 0, empty))[2])[: size - start]
