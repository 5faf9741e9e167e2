"""Which leaves of a model may be trained: what its own framework says of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import jax


def in_params(variables: Mapping[str, Any]) -> list[bool]:
    """For each leaf of Linen's variables whether it is in the collection "params"."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(variables)
    return [getattr(path[0], "key", None) == "params" for path, _ in pairs]


def not_a_state(tree: Any) -> list[bool]:
    """For each leaf of a tree whether it is no state by its type: of NNX variables only parameters are trained, and of
    an Equinox `State` nothing.
    """
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: _typed(node) is not None)
    return [_typed(node) is not False for node in nodes for _ in jax.tree.leaves(node)]


def _typed(node: Any) -> bool | None:
    """Whether something holds parameters; None where its type does not say."""
    nnx, equinox = sys.modules.get("flax.nnx"), sys.modules.get("equinox")
    if nnx is not None and isinstance(node, nnx.Variable):
        return isinstance(node, nnx.Param)
    if nnx is not None and type(node).__name__ == "VariableState":  # what Flax before 0.12 takes out of a module
        return issubclass(node.type, nnx.Param)
    if equinox is not None and isinstance(node, equinox.nn.State):
        return False
    return None


def is_nnx(model: Any) -> bool:
    """Whether it is a Flax NNX module."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(model, nnx.Module)


def is_linen(model: Any) -> bool:
    """Whether it is a Flax Linen module."""
    linen = sys.modules.get("flax.linen")
    return linen is not None and isinstance(model, linen.Module)


def is_equinox(model: Any) -> bool:
    """Whether it is an Equinox module."""
    equinox = sys.modules.get("equinox")
    return equinox is not None and isinstance(model, equinox.Module)
