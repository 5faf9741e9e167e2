"""A measurement inside of the user's own compiled function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core


def share_nothing(measure: Callable[[], Any]) -> Any:
    """What `measure()` returns, by a program that shares no operation with what else the caller computes.

    XLA joins equal operations, and fuses an operation with its successor if it has no other, which changes how it is
    rounded. So everything that the measurement takes from outside, what functions have closed over too, is taken
    through a selection whose condition is true, which XLA cannot know: nothing is equal then. A barrier would not do,
    for on a CPU XLA removes it before it joins operations for the last time; nor a branch, in which convolutions take
    many times as long.
    """
    closed, shapes = jax.make_jaxpr(measure, return_shape=True)()
    true = _opaque_true(closed.consts)
    consts = [jax.lax.select_n(true, jnp.zeros_like(array), array) for array in closed.consts]
    made = core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, consts))()
    return jax.tree.unflatten(jax.tree.structure(shapes), made)


def refuse_varying(tree: Any) -> None:
    """Raise ValueError inside of `jax.shard_map` where JAX follows which arrays differ between devices: the constants
    of a measurement, which are the same on all, would not fit.
    """
    if any(map(_varying, jax.tree.leaves(tree))):
        raise ValueError(
            "lnp was called inside of jax.shard_map with check_vma=True. Expected check_vma=False, where each device "
            "measures its own part of the batch, or with lnp_jax.decompose(..., group=axis) all measure the whole. "
            "Pass that, or measure outside."
        )


def _varying(leaf: Any) -> bool:
    """Whether JAX knows that an array differs between devices; the name of what it knows has changed."""
    aval = getattr(leaf, "aval", None)
    known = getattr(getattr(aval, "manual_axis_type", None), "varying", getattr(aval, "vma", None))
    return bool(known)


def _opaque_true(arrays: Sequence[Any]) -> jax.Array:
    """True, shape (), made of what is traced, so that XLA cannot know it; a constant where nothing is traced."""
    some = next((array for array in arrays if isinstance(array, jax.core.Tracer) and array.size), jnp.zeros(1))
    some = jax.random.key_data(some) if jnp.issubdtype(some.dtype, jax.dtypes.prng_key) else some
    return (some.ravel()[0].astype(jnp.int32) | 1) != 0
