"""Whether a loss of the user's own is a mean over samples: found out while tracing, on stand-ins for its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lnp.losses import mean_test
from lnp.losses.kinds import TRIED, agrees, all_agree
from lnp_jax.outputs import flatten, parts


def found_separable(function: Callable, outputs: Any, targets: Any) -> bool:
    """Whether the loss gradient of M samples alone is that among N, times N / M.

    Only the shapes and dtypes of a batch's `outputs` and `targets` are looked at. A loss that cannot be called with a
    part of them, or by itself while its caller is traced, is none.
    """
    samples = parts(outputs)[0].shape[0]
    leaves = jax.tree.leaves((outputs, targets))
    if any(not hasattr(leaf, "dtype") or (leaf.ndim and leaf.shape[0] != samples) for leaf in leaves):
        return False
    try:
        with jax.ensure_compile_time_eval():
            draws = range(mean_test.DRAWS)
            return all_agree([_agrees(function, *_stand_ins(outputs, targets, draw)) for draw in draws])
    except (RuntimeError, ValueError, TypeError, IndexError):  # whatever a loss says to a part of its batch
        return False


def _stand_ins(outputs: Any, targets: Any, draw: int) -> tuple[Any, Any]:
    """Those for a few samples."""
    classes = mean_test.classes([leaf.shape for leaf in parts(outputs)])

    def output(leaf: Any) -> Any:
        shape = _few(leaf)
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return mean_test.outputs(shape, leaf.dtype, draw) if floating else target(leaf)

    def target(leaf: Any) -> Any:
        return mean_test.targets(_few(leaf), leaf.dtype, classes, draw)

    return jax.tree.map(lambda leaf: jnp.asarray(output(leaf)), outputs), jax.tree.map(
        lambda leaf: jnp.asarray(target(leaf)), targets
    )


def _few(leaf: Any) -> tuple[int, ...]:
    return (min(leaf.shape[0], TRIED), *leaf.shape[1:]) if leaf.ndim else ()


def _agrees(function: Callable, outputs: Any, targets: Any) -> bool | None:
    whole = _gradient(function, outputs, targets)

    def alone(some: list[int]) -> tuple[jax.Array, jax.Array]:
        index = np.asarray(some)
        rows = lambda leaf: leaf[index] if leaf.ndim else leaf
        return whole[index], _gradient(function, jax.tree.map(rows, outputs), jax.tree.map(rows, targets))

    return agrees(jnp, whole, alone)


def _gradient(function: Callable, outputs: Any, targets: Any) -> jax.Array:
    leaves, treedef = jax.tree.flatten(outputs)
    floating = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def value(made: list[jax.Array]) -> jax.Array:
        given = dict(zip(floating, made, strict=True))
        return function(jax.tree.unflatten(treedef, [given.get(i, leaf) for i, leaf in enumerate(leaves)]), targets)

    return flatten(jax.grad(value)([leaves[i] for i in floating]))
