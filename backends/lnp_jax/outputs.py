"""From what a model returns to the (N, K) arrays that the core sees, and back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lnp.contract.validation import check_outputs


def parts(tree: Any) -> list[jax.Array]:
    """The floating-point leaves."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_measured(leaf)]


def flatten(tree: Any) -> jax.Array:
    """(N, K) in float32 or better."""
    leaves = parts(tree)
    samples = check_outputs([leaf.shape for leaf in leaves])
    dtype = jnp.result_type(jnp.float32, *[leaf.dtype for leaf in leaves])
    return jnp.concatenate([leaf.reshape(samples, -1).astype(dtype) for leaf in leaves], axis=1)


def rebuild(flat: jax.Array, tree: Any) -> Any:
    """The inverse of `flatten`, in the dtype of `flat`; leaves that are not measured stay."""
    leaves, treedef = jax.tree.flatten(tree)
    at, made = 0, []
    for leaf in leaves:
        size = leaf.size // leaf.shape[0] if is_measured(leaf) else 0
        made.append(flat[:, at : at + size].reshape(leaf.shape) if size else leaf)
        at += size
    return jax.tree.unflatten(treedef, made)


def is_measured(leaf: Any) -> bool:
    """Whether it is an array of floating-point numbers."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
