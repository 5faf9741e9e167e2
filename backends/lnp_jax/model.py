"""What a model is here: a hashable structure, and the arrays that fill it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lnp.contract.validation import select
from lnp_jax.names import distinct_names, dotted
from lnp_jax.outputs import as_real, like
from lnp_jax.state_guard import restoring_state
from lnp_jax.trained import in_params, is_equinox, is_linen, is_nnx, not_a_state

Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class Structure:
    """All of a model that is not an array. Models of equal structure share compiled code.

    Attributes
    ----------
    kind:
        "function", "equinox", "nnx" or "linen".
    static:
        The function, graph definition or module.
    treedef, fixed:
        Of the arrays: how they are nested, and the leaves that are no arrays (position, value).
    names:
        Of the array leaves, in their order: no two are the same.
    trained:
        The names that are differentiated.
    complex:
        Those of them that are complex: their arrays are the real and imaginary parts, along a last axis.
    forward:
        The user's (model, inputs) -> outputs, or None.
    notes:
        What was taken for parameters, where that is not sure.
    program:
        What else decides which program it is, as a text: what its functions read from Python.
    """

    kind: str
    static: Any
    treedef: Any
    fixed: tuple[tuple[int, Any], ...]
    names: tuple[str, ...]
    trained: tuple[str, ...]
    complex: tuple[str, ...]
    forward: Callable | None
    notes: tuple[str, ...] = ()
    program: str = ""

    def tree(self, arrays: Mapping[str, Any]) -> Any:
        """The arrays as the user has nested them."""
        values = [like(jnp.complex64, arrays[name]) if name in self.complex else arrays[name] for name in self.names]
        for position, value in self.fixed:
            values.insert(position, value)
        return jax.tree.unflatten(self.treedef, values)

    def call(self, arrays: Mapping[str, Any], inputs: Any) -> Any:
        """The outputs of the model that these arrays make; what it changes in itself is dropped."""
        tree = self.tree(arrays)
        if self.kind == "function":
            return restoring_state(self.static)(tree, inputs)
        if self.kind == "nnx":
            model = merged(self.static, tree)
        elif self.kind == "linen":
            variables, rngs = tree
            written = [name for name in variables if name != "params"]
            model = self.static.bind(variables, rngs=rngs or None, mutable=written)
        else:
            model = tree
        if self.kind == "equinox" and self.forward is None:
            return restoring_state(_call_with_batch, model)(model, inputs)
        return restoring_state(self.forward or call_model, model)(model, inputs)


def accepts(model: Any) -> bool:
    """Whether the model is a Flax or Equinox module, or a function with parameters that are arrays.

    Numbers and texts of Python among the parameters are accepted, to be named in an error.
    """
    if is_nnx(model) or is_linen(model) or is_equinox(model):
        return True
    if not (isinstance(model, tuple) and len(model) == 2 and callable(model[0])):
        return False
    try:
        leaves = jax.tree.leaves(model[1])
    except (TypeError, ValueError):  # keys that JAX cannot sort, which other frameworks take
        return False
    if any(isinstance(leaf, jax.Array) for leaf in leaves):
        return True
    return any(map(_is_array, leaves)) and all(_is_array(leaf) or type(leaf) in PYTHON for leaf in leaves)


PYTHON = (bool, int, float, complex, str, bytes)
"""Types of leaves that belong to no framework."""


def separate(model: Any, forward: Callable | None, parameters: Any) -> tuple[Structure, Arrays]:
    """A model's structure, and {name: array} of all its arrays.

    Raises
    ------
    ValueError
        For a model without trainable or selected parameters, for leaves among the parameters of a function that are no
        arrays, and for a Linen module that is not bound.
    """
    kind, static, tree, flags = _opened(model, forward)
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    held = [(path, leaf, flag) for (path, leaf), flag in zip(pairs, flags, strict=True) if _is_array(leaf)]
    fixed = tuple((index, leaf) for index, (_, leaf) in enumerate(pairs) if not _is_array(leaf))
    if kind == "function" and not is_equinox(tree):
        _check_leaves([pairs[index] for index, _ in fixed])
    may_train = [flag and jnp.issubdtype(leaf.dtype, jnp.inexact) for _, leaf, flag in held]
    names = distinct_names([path for path, *_ in held], may_train, kind)
    trained = tuple(select([name for name, may in zip(names, may_train, strict=True) if may], parameters))
    arrays = {name: leaf for name, (_, leaf, _) in zip(names, held, strict=True)}
    twofold = tuple(name for name in trained if jnp.issubdtype(arrays[name].dtype, jnp.complexfloating))
    arrays |= {name: as_real(arrays[name]) for name in twofold if not deleted(arrays[name])}
    return Structure(kind, static, treedef, fixed, tuple(names), trained, twofold, forward), arrays


def call_model(model: Callable, inputs: Any) -> Any:
    """model(x), model(*tuple) or model(**dict)."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, list | tuple):
        return model(*inputs)
    return model(inputs)


def merged(definition: Any, states: tuple) -> Any:
    """An NNX module with variables of its own, which Flax before 0.12 makes in any case."""
    merge = sys.modules["flax.nnx"].merge
    own = {"copy": True} if "copy" in inspect.signature(merge).parameters else {}
    return merge(definition, *states, **own)


def _call_with_batch(model: Callable, inputs: Any) -> Any:
    """An Equinox module on a batch; most take one sample, and say so in the words of their first operation."""
    try:
        return call_model(model, inputs)
    except Exception as error:
        raise ValueError(
            f"The Equinox module {type(model).__name__} was called with the whole batch, and raised "
            f"{type(error).__name__}: {error} Expected a module that takes batches. If it takes single samples, pass "
            "forward=, a function defined once that maps it over them: lambda model, x: jax.vmap(model)(x)."
        ) from error


def _opened(model: Any, forward: Callable | None) -> tuple[str, Any, Any, list[bool]]:
    """(kind, static part, tree of arrays, for each leaf whether it may be trained)."""
    if isinstance(model, tuple):
        if forward is not None:
            raise ValueError(
                "forward= was given for a model that is a pair (apply, parameters). Expected it for modules only: "
                "put what it does into apply(parameters, inputs)."
            )
        function, tree = model
        if is_linen(function):
            raise ValueError(
                f"The model is a pair of the Linen module {type(function).__name__} and its variables. Expected a "
                "function first: pass (module.apply, variables)."
            )
        linen = is_linen(getattr(function, "__self__", None)) and isinstance(tree, Mapping) and "params" in tree
        return "function", function, tree, in_params(tree) if linen else not_a_state(tree)
    if is_nnx(model):
        nnx = sys.modules["flax.nnx"]
        definition, parameters, rest = nnx.split(model, nnx.Param, ...)
        flags = [True] * len(jax.tree.leaves(parameters)) + [False] * len(jax.tree.leaves(rest))
        return "nnx", definition, (parameters, rest), flags
    if is_linen(model):
        module, variables, rngs = unbound(model)
        return "linen", module, (variables, rngs), in_params(variables) + [False] * len(rngs)
    return "equinox", None, model, not_a_state(model)


def unbound(model: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(module, variables, {name of a random stream: key}) of a bound Linen module."""
    if model.scope is None:
        raise ValueError(
            f"The Linen module {type(model).__name__} is not bound to variables. Expected "
            "module.bind(variables), or the pair (module.apply, variables). Bind it first."
        )
    module, variables = model.unbind()
    return module, dict(variables), {name: rng.as_jax_rng() for name, rng in (model.scope.rngs or {}).items()}


def _check_leaves(others: list[tuple[tuple, Any]]) -> None:
    """Raise ValueError for leaves among a function's parameters that are no arrays."""
    if others:
        named = ", ".join(f"{dotted(path)} ({type(leaf).__name__})" for path, leaf in others)
        raise ValueError(
            f"The parameters hold leaves that are no arrays: {named}. Expected arrays of JAX or NumPy only. Make a "
            "number that is trained an array (jnp.asarray), and close over what is not trained in apply."
        )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def check_alive(arrays: Mapping[str, Any]) -> None:
    """Raise ValueError for arrays that are gone."""
    gone = [name for name, array in arrays.items() if deleted(array)]
    if gone:
        raise ValueError(
            f"Arrays of the model were donated to a compiled function and are deleted: {gone[:4]}. Expected the model "
            "that the update has made. In tracker.step, say it: watched.after(new_model)."
        )


def deleted(leaf: Any) -> bool:
    """Whether an array was donated to a compiled function, and is gone."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()
