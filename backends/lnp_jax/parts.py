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
        return [leaf for leaf, over in zip(self._leaves, self._over, strict=True) if over]

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
    """v -> {name: (N,) array of ||J_n^T v_n||^2}: gradients of as many samples at a time as fit the budget."""
    of_one = single(function, split)
    size = sum(p.size * p.dtype.itemsize for p in parameters.values())
    chunk = int(max(1, min(split.samples, BUDGET // max(size, 1))))

    def square_norms(rows_and_v: tuple) -> dict[str, jax.Array]:
        rows, v = rows_and_v
        (pulled,) = jax.vjp(lambda p: of_one(p, rows), parameters)[1](v)
        return {name: jnp.sum(wide(grad) ** 2) for name, grad in pulled.items()}

    return lambda v: jax.lax.map(square_norms, (split.rows, v), batch_size=chunk)


def coupling(
    function: Function, split: Split, parameters: Mapping, outputs: jax.Array, g: jax.Array, gradient: Mapping
) -> jax.Array:
    """The largest relative difference between single samples and the batch, in outputs and in J^T g."""
    of_one = single(function, split)
    alone, pullback = jax.vjp(lambda p: jax.vmap(of_one, (None, 0))(p, split.rows), parameters)
    if alone.shape != outputs.shape:
        return jnp.asarray(jnp.inf)
    in_outputs = jnp.max(jnp.abs(alone - outputs)) / _positive(jnp.max(jnp.abs(outputs)))
    (pulled,) = pullback(g.astype(alone.dtype))
    norms = jnp.stack([jnp.linalg.norm(wide(gradient[name]).ravel()) for name in pulled])
    missed = jnp.stack([jnp.linalg.norm((wide(pulled[name]) - wide(gradient[name])).ravel()) for name in pulled])
    # a parameter whose gradient is rounding noise beside the others' (a key's bias) is compared with a share of the
    # whole
    floor = 0.03 * jnp.linalg.norm(norms)
    return jnp.maximum(in_outputs, jnp.max(missed / _positive(norms + floor)))


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
        full, rest = self._parts(self.split.rows)
        made = [jax.lax.map(lambda rows: self._flat(parameters, rows), full)] if full else []
        made += [self._flat(parameters, rest)] if rest else []
        return jnp.concatenate([part.reshape(-1, part.shape[-1]) for part in made])

    def vjp(self, parameters: Mapping, v: jax.Array) -> Mapping:
        """J^T v as the sum over micro-batches."""
        full, rest = self._parts([*self.split.rows, v])
        total = jax.tree.map(jnp.zeros_like, dict(parameters))
        if full:
            add = lambda sums, arrays: (jax.tree.map(jnp.add, sums, self._pulled(parameters, arrays)), None)
            total, _ = jax.lax.scan(add, total, full)
        return jax.tree.map(jnp.add, total, self._pulled(parameters, rest)) if rest else total

    def square_norms(self, parameters: Mapping, v: jax.Array) -> Mapping:
        """{name: (G,) array of ||J_g^T v_g||^2}."""
        full, rest = self._parts([*self.split.rows, v])
        squares = lambda arrays: {n: jnp.sum(wide(u) ** 2) for n, u in self._pulled(parameters, arrays).items()}
        made = [jax.lax.map(squares, full)] if full else []
        made += [jax.tree.map(lambda value: value[None], squares(rest))] if rest else []
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *made)

    def _flat(self, parameters: Mapping, rows: list) -> jax.Array:
        return flatten(self.function(parameters, self.split.inputs(rows)))

    def _pulled(self, parameters: Mapping, arrays: list) -> Mapping:
        *rows, v = arrays
        return jax.vjp(lambda p: self._flat(p, rows), dict(parameters))[1](v)[0]

    def _parts(self, arrays: list) -> tuple[list, list]:
        """Whole micro-batches stacked along a new first axis, and what is left over; empty lists for none."""
        count = self.split.samples // self.size
        head = count * self.size
        full = [a[:head].reshape(count, self.size, *a.shape[1:]) for a in arrays] if count else []
        return full, [a[head:] for a in arrays] if head < self.split.samples else []


def wide(array: jax.Array) -> jax.Array:
    """In float32 or better."""
    return array.astype(jnp.result_type(jnp.float32, array.dtype))


def _positive(value: jax.Array) -> jax.Array:
    return jnp.maximum(value, jnp.finfo(value.dtype).tiny)
