"""Maximum pooling that remembers which number of a window was the largest.

XLA's own backward pass looks for it again at each pull-back, by a window over pairs of a number and its place: on a CPU
that takes as long as a convolution.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

OFFSETS = 16
"""Places in a window up to which it pays to go through them."""


def max_pool(eqn: Any, x: jax.Array) -> jax.Array | None:
    """What a `reduce_window_max` makes of x, with a backward pass of comparisons and sums; None where windows are large
    or dilated.
    """
    window, strides = eqn.params["window_dimensions"], eqn.params["window_strides"]
    dilated = {*eqn.params["base_dilation"], *eqn.params["window_dilation"]} != {1}
    if math.prod(window) > OFFSETS or dilated:
        return None
    offsets = list(itertools.product(*(range(size) for size in window)))
    padding = [(lo, hi, 0) for lo, hi in eqn.params["padding"]]
    made = eqn.outvars[0].aval.shape
    lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min

    @jax.custom_vjp
    def pool(x: jax.Array) -> jax.Array:
        return eqn.primitive.bind(x, **eqn.params)

    def forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, wide = pool(x), lax.pad(x, jnp.asarray(lowest, x.dtype), padding)
        place = jnp.full(y.shape, -1, jnp.int8)
        for number, offset in reversed(list(enumerate(offsets))):  # the first of equals, as XLA has it
            place = jnp.where(_seen(wide, offset) == y, jnp.int8(number), place)
        return y, place

    def backward(place: jax.Array, d: jax.Array) -> tuple[jax.Array]:
        total = jnp.zeros(_padded(eqn.invars[0].aval.shape, padding), d.dtype)
        for number, offset in enumerate(offsets):
            own = jnp.where(place == number, d, jnp.zeros((), d.dtype))
            around = [
                (first, size - first - (count - 1) * stride - 1, stride - 1)
                for first, stride, size, count in zip(offset, strides, total.shape, made, strict=True)
            ]
            total = total + lax.pad(own, jnp.zeros((), d.dtype), around)
        return (lax.pad(total, jnp.zeros((), d.dtype), [(-lo, -hi, 0) for lo, hi, _ in padding]),)

    def _seen(wide: jax.Array, offset: tuple[int, ...]) -> jax.Array:
        last = [first + (count - 1) * stride + 1 for first, count, stride in zip(offset, made, strides, strict=True)]
        return lax.slice(wide, offset, last, strides)

    pool.defvjp(forward, backward)
    return pool(x)


def _padded(shape: tuple[int, ...], padding: list) -> list[int]:
    return [size + lo + hi for size, (lo, hi, _) in zip(shape, padding, strict=True)]
