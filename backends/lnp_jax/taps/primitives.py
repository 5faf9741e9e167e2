"""Taps: operations as they are, whose backward pass also says what their parameter's samples get at that place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from lnp_jax.taps.rules import Use

BUDGET = 2**22
"""Numbers that the arithmetic of squared norms keeps in memory at a time."""
Operation = Callable[[jax.Array, jax.Array], jax.Array]
"""(what stands beside the weight, the weight) -> what comes out, of one sample."""


def tapped_use(use: Use, of_one: Operation, x: Any, w: Any, z: Any) -> jax.Array:
    """`of_one(x, w)`, with a tap on the weight's gradients G_n = dL_n/dw.

    Backward, under `jax.vmap` over the samples, the cotangent of z, a number for each sample, is ||G_n||^2.
    """

    @custom_vmap
    def one(x: Any, w: Any, z: Any) -> Any:
        return of_one(x, w)

    @one.def_vmap
    def many(size: int, batched: list, x: Any, w: Any, z: Any) -> tuple[Any, bool]:
        x_over, w_over, z_over = batched
        x, z = (
            value if over else jnp.broadcast_to(value, (size, *jnp.shape(value)))
            for value, over in ((x, x_over), (z, z_over))
        )
        return _with_tap(use, of_one, w_over)(x, w, z), True

    return one(x, w, z)


def _with_tap(use: Use, of_one: Operation, apart: bool) -> Callable:
    """The operation on all samples, with its tap; `apart` where each sample has its own copy of the weight already."""
    of_all = jax.vmap(of_one, (0, 0 if apart else None))

    @jax.custom_vjp
    def operation(x: Any, w: Any, z: Any) -> Any:
        return of_all(x, w)

    def backward(kept: tuple, d: Any) -> tuple:
        x, w, z = kept
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
        return of_x, of_w, norms.astype(z.dtype)

    operation.defvjp(lambda x, w, z: (of_all(x, w), (x, w, z)), backward)
    return operation


def chunked(use: Use, beside: jax.Array, d: jax.Array) -> jax.Array:
    """(N,) squared norms, of as many samples at a time as the budget holds."""
    samples, chunk = d.shape[0], max(1, BUDGET // max(use.size, 1))
    if chunk >= samples:
        return use.square_norms(beside, d)

    def of_one(pair: tuple) -> jax.Array:
        return use.square_norms(*(array[None] for array in pair))[0]

    return jax.lax.map(of_one, (beside, d), batch_size=chunk)
