"""From what a model returns to the (N, K) arrays that the core sees, and back.

A complex number is two real ones, its real and its imaginary part, in outputs as in parameters.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lnp.contract.validation import check_outputs


def parts(tree: Any) -> list[jax.Array]:
    """The leaves of floating-point numbers, as real ones."""
    return [as_real(leaf) for leaf in jax.tree.leaves(tree) if is_measured(leaf)]


def flatten(tree: Any) -> jax.Array:
    """(N, K) in float32 or better."""
    leaves = parts(tree)
    samples = check_outputs([leaf.shape for leaf in leaves])
    dtype = jnp.result_type(jnp.float32, *[leaf.dtype for leaf in leaves])
    return jnp.concatenate([leaf.reshape(samples, -1).astype(dtype) for leaf in leaves], axis=1)


def rebuild(flat: jax.Array, tree: Any) -> Any:
    """The inverse of `flatten`, in the precision of `flat`; leaves that are not measured stay."""
    leaves, treedef = jax.tree.flatten(tree)
    at, made = 0, []
    for leaf in leaves:
        size = real_size(leaf) // leaf.shape[0] if is_measured(leaf) else 0
        shape = (*leaf.shape, 2) if is_complex(leaf) else jnp.shape(leaf)
        made.append(like(leaf.dtype, flat[:, at : at + size].reshape(shape)) if size else leaf)
        at += size
    return jax.tree.unflatten(treedef, made)


def as_real(array: Any) -> Any:
    """Real and imaginary parts of complex numbers along a last axis; real numbers as they are."""
    if not is_complex(array):
        return array
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.eval_shape(as_real, array)
    return jnp.stack([jnp.real(array), jnp.imag(array)], axis=-1)


def like(dtype: Any, values: jax.Array) -> jax.Array:
    """Numbers in the form of `as_real` as numbers of a kind: complex ones where the type is complex."""
    return lax.complex(values[..., 0], values[..., 1]) if jnp.issubdtype(dtype, jnp.complexfloating) else values


def real_size(leaf: Any) -> int:
    """How many real numbers an array holds."""
    return leaf.size * (2 if is_complex(leaf) else 1)


def is_measured(leaf: Any) -> bool:
    """Whether it is an array of real or complex floating-point numbers."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def is_complex(leaf: Any) -> bool:
    """Whether it is an array of complex numbers."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.complexfloating)
