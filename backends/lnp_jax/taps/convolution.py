r"""Gradients of a convolution's weight, sample by sample: their squared norms, and their sum by the way.

With x padded and channels last, d the cotangent of what comes out, and o the offsets of the kernel,

    G_n[o] = sum_s x_n[s + o] d_n[s]^T                                                        direct form
    ||G_n||^2 = sum_{s,t} (sum_o x_n[s + o] . x_n[t + o]) (d_n[s] . d_n[t])                   Gram form

where the bracket is read from one matrix of inner products of the padded positions. A few samples at a time, as many as
a processor's cache holds: on a CPU that takes less time than XLA's own gradient of the weight, and half of what the
whole batch at once takes.

Source: Bu, Mao, Xu, arXiv 2205.10683 (Gram form with patches).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from lnp_jax.fallback import wide

CACHE = 2**18
"""Numbers that are in use at a time on a CPU."""
BUDGET = 2**24
"""On other devices, where small pieces leave the device idle."""
GRAM_ADVANTAGE = 2.0
"""How many times fewer multiplications the Gram form needs to be preferred: measured with 32 to 128 channels."""


@dataclass(frozen=True)
class Window:
    """How a kernel slides over x (N, *padded, groups * C) to make y (N, *made, groups * O).

    Attributes
    ----------
    kernel, stride, dilation:
        One number for each spatial axis.
    padded, made:
        Lengths of the spatial axes of x and of y.
    channels, outputs, groups:
        C, O, and into how many groups the channels fall.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padded: tuple[int, ...]
    made: tuple[int, ...]
    channels: int
    outputs: int
    groups: int = 1

    @property
    def gram(self) -> bool:
        """Whether the Gram form pays."""
        taps, given, made = (math.prod(lengths) for lengths in (self.kernel, self.padded, self.made))
        products = given**2 * self.channels + made**2 * (self.outputs + 4 * taps)
        return GRAM_ADVANTAGE * products < made * self.channels * self.outputs * taps

    @property
    def numbers(self) -> int:
        """In use for one sample and group."""
        taps, given, made = (math.prod(lengths) for lengths in (self.kernel, self.padded, self.made))
        own = given**2 + 3 * made**2 if self.gram else self.channels * self.outputs * taps
        return given * self.channels * self.kernel[-1] + made * self.outputs + own

    def cut(self, x: jax.Array, offsets: Mapping[int, int]) -> jax.Array:
        """x (N, *lengths, ...), along these spatial axes as the kernel sees it at these offsets."""
        index = [slice(None)] * x.ndim
        for axis, offset in offsets.items():
            along = axis % len(self.kernel)  # axes of a Gram matrix come twice
            first, stride = offset * self.dilation[along], self.stride[along]
            index[axis + 1] = slice(first, first + (self.made[along] - 1) * stride + 1, stride)
        return x[tuple(index)]


def square_norms(x: jax.Array, d: jax.Array, window: Window) -> jax.Array:
    """||G_n||^2, shape (N,)."""
    if not window.gram:
        return with_gradient(x, d, window)[0]
    x, d = _parts(x, window), _parts(d, window)
    size = _size(len(x), 1, window)
    found = lax.map(lambda pair: _gram(pair[0], pair[1], window), (_chunks(x, size), _chunks(d, size)))
    return jnp.sum(found.reshape(-1, window.groups), axis=1)


def with_gradient(x: jax.Array, d: jax.Array, window: Window) -> tuple[jax.Array, jax.Array]:
    """(||G_n||^2 (N,), sum_n G_n of shape (*kernel, C, groups * O))."""
    x, d, groups = _parts(x, window), _parts(d, window), window.groups
    size = _size(len(x), groups, window)

    def step(total: jax.Array, pair: tuple) -> tuple[jax.Array, jax.Array]:
        own = _direct(pair[0], pair[1], window)
        return total + jnp.sum(own.reshape(-1, *total.shape), axis=0), jnp.sum(own**2, axis=(1, 2, 3))

    shape = (groups, math.prod(window.kernel), window.channels, window.outputs)
    zeros = jnp.zeros(shape, wide(x[:0]).dtype)
    total, found = lax.scan(step, zeros, (_chunks(x, size), _chunks(d, size)))
    kernel = jnp.moveaxis(total, 0, 2).reshape(*window.kernel, window.channels, -1)
    return jnp.sum(found.reshape(-1, groups), axis=1), kernel


def _direct(x: jax.Array, d: jax.Array, window: Window) -> jax.Array:
    """G_n, shape (N, taps, C, O). Offsets along the last axis lie side by side, which makes products larger."""
    last = len(window.kernel) - 1
    side = jnp.concatenate([window.cut(x, {last: offset}) for offset in range(window.kernel[last])], axis=-1)

    def flat(array: jax.Array) -> jax.Array:
        return array.reshape(len(x), -1, array.shape[-1])

    offsets = itertools.product(*(range(size) for size in window.kernel[:last]))
    products = [_product(flat(window.cut(side, dict(enumerate(offset)))), flat(d), 1) for offset in offsets]
    return jnp.stack(products, axis=1).reshape(len(x), -1, window.channels, window.outputs)


def _gram(x: jax.Array, d: jax.Array, window: Window) -> jax.Array:
    def flat(array: jax.Array) -> jax.Array:
        return array.reshape(len(x), -1, array.shape[-1])

    inner = _product(flat(x), flat(x), 2).reshape(len(x), *window.padded, *window.padded)
    offsets = itertools.product(*(range(size) for size in window.kernel))
    seen = sum(window.cut(inner, dict(enumerate((*offset, *offset)))) for offset in offsets)
    outer = _product(flat(d), flat(d), 2)
    return jnp.sum(seen.reshape(outer.shape) * outer, axis=(1, 2))


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Of each sample's two matrices, along their axes `axis`, in float32 or better."""
    sums = wide(a[:0]).dtype
    return lax.dot_general(a, b, (((axis,), (axis,)), ((0,), (0,))), preferred_element_type=sums)


def _parts(array: jax.Array, window: Window) -> jax.Array:
    """(N, ..., groups * C) as (N * groups, ..., C)."""
    if window.groups == 1:
        return array
    split = array.reshape(*array.shape[:-1], window.groups, -1)
    return jnp.moveaxis(split, -2, 1).reshape(-1, *array.shape[1:-1], split.shape[-1])


def _size(parts: int, together: int, window: Window) -> int:
    """How many parts are taken at a time: what the budget holds of those numbers that divide them all."""
    budget = CACHE if jax.default_backend() == "cpu" else BUDGET
    most = max(1, budget // (window.numbers * together))
    return together * max(size for size in range(1, min(most, parts // together) + 1) if parts // together % size == 0)


def _chunks(array: jax.Array, size: int) -> jax.Array:
    return array.reshape(-1, size, *array.shape[1:])
