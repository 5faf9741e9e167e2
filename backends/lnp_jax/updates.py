"""Models before and after an update."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lnp.contract.linearization import Vector
from lnp.contract.vectors import update_by_name
from lnp_jax.model import Arrays, Structure, accepts, check_alive, merged, separate, unbound
from lnp_jax.outputs import as_real
from lnp_jax.trained import is_linen, is_nnx


def snapshot(model: Any) -> Any:
    """The model as it is now, with arrays of its own: a step may donate the model's, and NNX modules get others."""
    if isinstance(model, tuple):
        return model[0], _copied(model[1])
    if is_nnx(model):
        definition, state = sys.modules["flax.nnx"].split(model)
        return merged(definition, (_copied(state),))
    if is_linen(model) and model.scope is not None:
        module, variables, rngs = unbound(model)
        return module.bind(_copied(variables), rngs=_copied(rngs) or None)
    return _copied(model)


def difference(before: Any, after: Any) -> dict[str, Any]:
    """What the update added to each parameter, {name: array}."""
    structure, old = separate(before, None, None)
    other, new = separate(after, None, None)
    if structure.trained != other.trained:
        raise ValueError(
            "The model has other trained parameters than before. Expected the same model, before and after one update."
        )
    for arrays in (old, new):
        check_alive({name: arrays[name] for name in structure.trained})
    return {name: new[name] - old[name] for name in structure.trained}


def update_vector(structure: Structure, arrays: Arrays, model: Any, update: Any, diagonal: bool) -> Vector:
    """The user's update, a tree like the model's parameters or {name: array}, as a vector in parameter space: of real
    numbers, two for a complex one. The real entries of a `diagonal` count for both.
    """
    shapes = {name: jnp.shape(arrays[name]) for name in structure.trained}
    if isinstance(update, Mapping) and set(shapes) <= set(update) <= set(structure.names):
        update = {name: update[name] for name in shapes}  # with what the model holds beside its parameters
    if not (isinstance(update, Mapping) and set(update) <= set(shapes)):
        tree = (model[0], update) if isinstance(model, tuple) else update
        leaves = separate(tree, structure.forward, None)[1] if accepts(tree) else {}
        update = {name: leaf for name, leaf in leaves.items() if name in shapes}
    expected = "a tree of the parameters' structure, or {parameter name: array of its shape}"
    twofold = {
        name: _twofold(update[name], diagonal, shapes[name])
        for name in structure.complex
        if name in update and name in shapes
    }
    given = update_by_name({**update, **twofold}, shapes, list, expected)
    return {n: jnp.asarray(given[n]) if n in given else jnp.zeros_like(arrays[n]) for n in shapes}


def _twofold(part: Any, diagonal: bool, shape: tuple[int, ...]) -> Any:
    """The update of a complex parameter as real numbers."""
    if jnp.iscomplexobj(part) or np.shape(part) != shape[:-1]:
        return as_real(part)
    return jnp.stack([part, part if diagonal else jnp.zeros_like(part)], axis=-1)


def _copied(tree: Any) -> Any:
    """The tree with copies of its arrays, where they are."""
    return jax.tree.map(_copy, tree)


def _copy(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    return jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf
