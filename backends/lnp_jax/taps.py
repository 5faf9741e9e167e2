"""Taps: identities in the forward pass, whose backward pass says what a parameter's samples get at that place."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from lnp_jax.sites import Use

BUDGET = 2**22
"""Numbers that the arithmetic of squared norms keeps in memory at a time."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def norm_tap(use: Use, y: jax.Array, beside: jax.Array, z: jax.Array) -> jax.Array:
    """y. Backward, the cotangent of z, a number for each sample, is ||dL/dW||^2 of the weight that made y."""
    return y


def _forward(use: Use, y: jax.Array, beside: jax.Array, z: jax.Array) -> tuple[jax.Array, tuple]:
    return y, (beside, z)


def _backward(use: Use, kept: tuple, d: jax.Array) -> tuple:
    beside, z = kept
    return d, None, _of_one(use)(beside, d).astype(z.dtype)


norm_tap.defvjp(_forward, _backward)


def _of_one(use: Use) -> Any:
    """(what stands beside the weight, cotangent) of one sample -> (); of many together under `jax.vmap`."""

    @custom_vmap
    def one(beside: jax.Array, d: jax.Array) -> jax.Array:
        return use.norms(beside[None], d[None])[0]

    @one.def_vmap
    def many(size: int, batched: list, beside: jax.Array, d: jax.Array) -> tuple[jax.Array, bool]:
        beside, d = (
            a if over else jnp.broadcast_to(a, (size, *a.shape)) for a, over in zip((beside, d), batched, strict=True)
        )
        return chunked(use, beside, d), True

    return one


def chunked(use: Use, beside: jax.Array, d: jax.Array) -> jax.Array:
    """(N,) squared norms, of as many samples at a time as the budget holds."""
    samples, chunk = d.shape[0], max(1, BUDGET // max(use.size, 1))
    if chunk >= samples:
        return use.norms(beside, d)
    return jax.lax.map(lambda pair: use.norms(*(a[None] for a in pair))[0], (beside, d), batch_size=chunk)
