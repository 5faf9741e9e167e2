"""A batch in parts: single samples, and micro-batches, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lnp_jax.outputs import flatten

BUDGET = 2**28
"""Bytes of per-sample gradients that are in memory at a time."""

Function = Callable[[Mapping[str, jax.Array], Any], Any]
"""(parameters, inputs) -> outputs of any structure."""


class Split:
    """The inputs' leaves that run over samples, apart from those that do not."""

    def __init__(self, inputs: Any, samples: int) -> None:
        self._leaves, self._treedef = jax.tree.flatten(inputs)
        self._over = [getattr(leaf, "ndim", 0) > 0 and leaf.shape[0] == samples for leaf in self._leaves]
        self.samples = samples

    @property
    def possible(self) -> bool:
        """Whether there are any."""
        return any(self._over)

    @property
    def rows(self) -> list:
        """The leaves that run over samples."""
        return [jnp.asarray(leaf) for leaf, over in zip(self._leaves, self._over, strict=True) if over]

    def some(self, index: Any, size: int) -> Split:
        """The split of these samples, as many as `size`."""
        inputs = self.inputs([row[index] for row in self.rows])
        part = Split(inputs, size)
        part._over = self._over  # other leaves may happen to be as long
        return part

    def inputs(self, rows: list) -> Any:
        """Inputs with other rows in place of the batch's."""
        values = iter(rows)
        return jax.tree.unflatten(
            self._treedef, [next(values) if over else leaf for leaf, over in zip(self._leaves, self._over, strict=True)]
        )


def single(function: Function, split: Split) -> Callable[[Mapping, list], jax.Array]:
    """(parameters, one sample's rows) -> its outputs, shape (K,)."""
    return lambda parameters, rows: flatten(function(parameters, split.inputs([row[None] for row in rows])))[0]


def sample_square_norms(function: Function, split: Split, parameters: Mapping[str, jax.Array]) -> Callable:
    """(rows, v) -> {name: (N,) array of ||J_n^T v_n||^2}: gradients of as many samples at a time as fit the budget."""
    of_one = single(function, split)
    size = sum(p.size * p.dtype.itemsize for p in parameters.values())
    chunk = int(max(1, BUDGET // max(size, 1)))

    def square_norms(rows_and_v: tuple) -> dict[str, jax.Array]:
        rows, v = rows_and_v
        (pulled,) = jax.vjp(lambda p: of_one(p, rows), parameters)[1](v)
        return {name: jnp.sum(wide(grad) ** 2) for name, grad in pulled.items()}

    return lambda rows, v: jax.lax.map(square_norms, (rows, v), batch_size=min(chunk, v.shape[0]))


@dataclass(frozen=True)
class Micro:
    """The flat function over micro-batches of `size` samples, with one of them in memory at a time."""

    function: Function
    split: Split
    size: int

    @property
    def groups(self) -> int:
        """G, the number of micro-batches; the last one may be smaller."""
        return -(-self.split.samples // self.size)

    def outputs(self, parameters: Mapping) -> jax.Array:
        """f, shape (N, K)."""
        return self.visit(lambda rows: ((), self._flat(parameters, rows)), self.split.rows)[1]

    def pulled(self, parameters: Mapping, v: jax.Array) -> Mapping:
        """J^T v."""

        def gradient(arrays: list) -> tuple[dict, tuple]:
            *rows, v = arrays
            return jax.vjp(lambda p: self._flat(p, rows), dict(parameters))[1](v)[0], ()

        return self.visit(gradient, [*self.split.rows, v])[0]

    def square_norms(self, parameters: Mapping, v: jax.Array) -> Mapping:
        """{name: (G,) array of ||J_g^T v_g||^2}."""

        def squares(arrays: list) -> tuple[tuple, dict]:
            *rows, v = arrays
            (pulled,) = jax.vjp(lambda p: self._flat(p, rows), dict(parameters))[1](v)
            return (), {name: jnp.sum(wide(u) ** 2)[None] for name, u in pulled.items()}

        return self.visit(squares, [*self.split.rows, v])[1]

    def visit(self, function: Callable[[list], tuple[Any, Any]], arrays: list) -> tuple[Any, Any]:
        """(sum, concatenation) over micro-batches of the two trees of arrays that the function returns."""
        count = self.split.samples // self.size
        head = count * self.size
        full = [a[:head].reshape(count, self.size, *a.shape[1:]) for a in arrays]
        rest = [a[head:] for a in arrays]
        if not count:
            return function(rest)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function, [a[0] for a in full])[0])

        def step(total: Any, some: list) -> tuple[Any, Any]:
            added, made = function(some)
            return jax.tree.map(jnp.add, total, added), made

        total, stacked = jax.lax.scan(step, zeros, full)
        made = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stacked)
        if head == self.split.samples:
            return total, made
        added, last = function(rest)
        joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), made, last)
        return jax.tree.map(jnp.add, total, added), joined

    def _flat(self, parameters: Mapping, rows: list) -> jax.Array:
        return flatten(self.function(parameters, self.split.inputs(rows)))


def wide(array: jax.Array) -> jax.Array:
    """In float32 or better."""
    return array.astype(jnp.result_type(jnp.float32, array.dtype))
