"""Taps: operations as they are, whose backward pass also says what their parameter's samples get at that place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from lnp_jax.fallback import wide
from lnp_jax.taps.rules import Use

BUDGET = 2**22
"""Numbers that the arithmetic of squared norms keeps in memory at a time."""
Operation = Callable[[jax.Array, jax.Array], jax.Array]
"""(what stands beside the weight, the weight) -> what comes out, of one sample."""


def tapped_use(use: Use, of_one: Operation, x: Any, w: Any, z: Any, along: tuple[Any, Any] | None) -> jax.Array:
    """`of_one(x, w)`, with taps on the weight's gradients G_n = dL_n/dw.

    Backward, under `jax.vmap` over the samples, the cotangent of z, a number for each sample, is ||G_n||^2. With
    `along` = (a, index), which are not mapped, the cotangent of a is <G_m, sum_n G_n> for the samples m of that index:
    the operation is linear in its weight, so that this is <of_one(x_m, sum_n G_n), cotangent of sample m>.
    """
    a, index = (None, None) if along is None else along

    @custom_vmap
    def one(x: Any, w: Any, z: Any, a: Any, index: Any) -> Any:
        return of_one(x, w)

    @one.def_vmap
    def many(size: int, batched: list, x: Any, w: Any, z: Any, a: Any, index: Any) -> tuple[Any, bool]:
        x_over, w_over, z_over = batched[:3]
        x, z = (
            value if over else jnp.broadcast_to(value, (size, *jnp.shape(value)))
            for value, over in ((x, x_over), (z, z_over))
        )
        return _measured(use, of_one, w_over)(x, w, z, a, index), True

    return one(x, w, z, a, index)


def _measured(use: Use, of_one: Operation, apart: bool) -> Callable:
    """The operation on all samples, with its taps; `apart` where each sample has its own copy of the weight already."""
    of_all = jax.vmap(of_one, (0, 0 if apart else None))

    @jax.custom_vjp
    def operation(x: Any, w: Any, z: Any, a: Any, index: Any) -> Any:
        return of_all(x, w)

    def backward(kept: tuple, d: Any) -> tuple:
        x, w, z, a, index = kept
        if use.gradient is None or apart:
            norms, (of_w,) = chunked(use, x, d), jax.vjp(lambda w: of_all(x, w), w)[1](d)
        else:
            norms, of_w = use.gradient(x, d)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            of_x = None
        elif use.back is None:
            (of_x,) = jax.vjp(lambda x: of_all(x, w), x)[1](d)
        else:
            of_x = jax.vmap(use.back, (0 if apart else None, 0))(w, d).astype(x.dtype)
        of_a = None
        if a is not None:
            product = jax.vmap(of_one, (0, None))(x[index], jnp.sum(of_w, axis=0) if apart else of_w)
            of_a = inner(product, d[index]).astype(a.dtype)
        return of_x, of_w, norms.astype(z.dtype), of_a, None

    operation.defvjp(lambda *given: (of_all(*given[:2]), given), backward)
    return operation


def inner(one: jax.Array, other: jax.Array) -> jax.Array:
    """Of the rows of two arrays (M, ...), in float32 or better. Shape (M,)."""
    product = wide(one) * wide(other)
    return jnp.sum(product.reshape(len(product), -1), axis=1)


def chunked(use: Use, beside: jax.Array, d: jax.Array) -> jax.Array:
    """(N,) squared norms, of as many samples at a time as the budget holds."""
    samples, chunk = d.shape[0], max(1, BUDGET // max(use.size, 1))
    if chunk >= samples:
        return use.norms(beside, d)
    return jax.lax.map(lambda pair: use.norms(*(a[None] for a in pair))[0], (beside, d), batch_size=chunk)
