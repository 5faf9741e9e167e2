"""Records outside of a compiled computation: for dense kernels and for operators that are handed out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import array_api_compat
import numpy as np

from lnp.arguments import Batch, Model
from lnp.contract import registry
from lnp.contract.linearization import Array, Linearization, device_of
from lnp.contract.options import Options


def linearize(model: Model, batch: Batch, options: Options) -> Linearization:
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


def compile_products(lin: Linearization, function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The function, compiled once for all calls where the framework compiles its loops; shape (N, K) in and out.

    It runs as the only turn of the record's loop, which is the one thing that every compiling framework compiles.
    """

    def body(state: tuple) -> tuple:
        return state[0] + 1, state[1], function(state[1])

    def condition(state: tuple) -> Any:
        return state[0] < 1

    return lambda v: lin.while_loop(condition, body, (0, v, lin.xp.zeros_like(lin.outputs)))[2]


def kernel_rows(lin: Linearization, block: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows of Theta, shape (B, N, K)) for blocks of at most `block` rows, each row J (J^T e)."""
    assert lin.jvp is not None, "linearize() looks for it"
    xp, jvp = lin.xp, lin.jvp
    samples, outputs = lin.outputs.shape
    size = samples * outputs
    device = device_of(lin.outputs)
    index = xp.reshape(xp.arange(size, device=device), (samples, outputs))
    within = xp.reshape(xp.arange(block, device=device), (block, 1, 1))
    empty = xp.zeros((block, samples, outputs), dtype=lin.outputs.dtype, device=device)

    def condition(state: tuple) -> Any:
        start, i, _ = state
        return (i < block) & (start + i < size)

    def body(state: tuple) -> tuple:
        start, i, rows = state
        row = jvp(lin.vjp(xp.astype(index == start + i, lin.outputs.dtype)))
        return start, i + 1, xp.where(within == i, xp.astype(row, rows.dtype, copy=False)[None, :, :], rows)

    for start in range(0, size, block):
        yield start, to_numpy(lin.while_loop(condition, body, (start, 0, empty))[2])[: size - start]
