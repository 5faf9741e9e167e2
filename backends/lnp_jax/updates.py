"""Models before and after an update."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lnp_jax.model import is_linen, is_nnx, separate


def snapshot(model: Any) -> Any:
    """The model as it is now, with arrays of its own: a step may donate the model's, and NNX modules get others."""
    if isinstance(model, tuple):
        return model[0], _copied(model[1])
    if is_nnx(model):
        nnx = sys.modules["flax.nnx"]
        definition, state = nnx.split(model)
        return nnx.merge(definition, _copied(state), copy=True)
    if is_linen(model) and model.scope is not None:
        module, variables = model.unbind()
        return module.bind(_copied(variables))
    return _copied(model)


def difference(before: Any, after: Any) -> dict[str, Any]:
    """What the update added to each parameter, {name: array}."""
    structure, old = separate(before, None, None)
    other, new = separate(after, None, None)
    if structure.trained != other.trained:
        raise ValueError(
            "The model has other trained parameters than before. Expected the same model, before and after one update."
        )
    gone = [name for name in structure.trained if _deleted(new[name]) or _deleted(old[name])]
    if gone:
        raise ValueError(
            f"Arrays of the model were donated to a compiled function and are deleted: {gone[:4]}. Expected the model "
            "that the update has made. In tracker.step, say it: watched.after(new_model)."
        )
    return {name: new[name] - old[name] for name in structure.trained}


def _copied(tree: Any) -> Any:
    """The tree with copies of its arrays, where they are."""
    return jax.tree.map(_copy, tree)


def _copy(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    return jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf


def _deleted(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()
