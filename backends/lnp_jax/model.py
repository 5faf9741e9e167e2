"""What a model is here: a hashable structure, and the arrays that fill it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lnp.contract.validation import select
from lnp_jax.state_guard import restoring_state

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
    forward:
        The user's (model, inputs) -> outputs, or None.
    program:
        What else decides which program it is, as a text: what its functions read from Python.
    """

    kind: str
    static: Any
    treedef: Any
    fixed: tuple[tuple[int, Any], ...]
    names: tuple[str, ...]
    trained: tuple[str, ...]
    forward: Callable | None
    program: str = ""

    def call(self, arrays: Mapping[str, Any], inputs: Any) -> Any:
        """The outputs of the model that these arrays make; what it changes in itself is dropped."""
        values = [arrays[name] for name in self.names]
        for position, value in self.fixed:
            values.insert(position, value)
        tree = jax.tree.unflatten(self.treedef, values)
        if self.kind == "function":
            return restoring_state(self.static)(tree, inputs)
        if self.kind == "nnx":
            model = sys.modules["flax.nnx"].merge(self.static, *tree, copy=True)
        elif self.kind == "linen":
            model = self.static.bind(tree, mutable=[name for name in tree if name != "params"])
        else:
            model = tree
        return restoring_state(self.forward or call_model, model)(model, inputs)


def accepts(model: Any) -> bool:
    """Whether the model is a Flax or Equinox module, or a function with parameters that are arrays."""
    if is_nnx(model) or is_linen(model) or _is_equinox(model):
        return True
    if not (isinstance(model, tuple) and len(model) == 2 and callable(model[0])):
        return False
    leaves = jax.tree.leaves(model[1])
    return bool(leaves) and all(_is_array(leaf) for leaf in leaves)


def separate(model: Any, forward: Callable | None, parameters: Any) -> tuple[Structure, Arrays]:
    """A model's structure, and {name: array} of all its arrays.

    Raises
    ------
    ValueError
        For a model without trainable or selected parameters, and for a Linen module that is not bound.
    """
    kind, static, tree, eligible = _opened(model, forward)
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    held = [(path, leaf) for path, leaf in pairs if _is_array(leaf)]
    fixed = tuple((index, leaf) for index, (_, leaf) in enumerate(pairs) if not _is_array(leaf))
    may_train = [_floating(leaf) and eligible(path) for path, leaf in held]
    names = distinct_names([path for path, _ in held], may_train, kind)
    trained = tuple(select([name for name, may in zip(names, may_train, strict=True) if may], parameters))
    arrays = {name: leaf for name, (_, leaf) in zip(names, held, strict=True)}
    return Structure(kind, static, treedef, fixed, tuple(names), trained, forward), arrays


def call_model(model: Callable, inputs: Any) -> Any:
    """model(x), model(*tuple) or model(**dict)."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, list | tuple):
        return model(*inputs)
    return model(inputs)


def _opened(model: Any, forward: Callable | None) -> tuple[str, Any, Any, Callable[[tuple], bool]]:
    """(kind, static part, tree of arrays, whether a path in it may be trained)."""
    if isinstance(model, tuple):
        if forward is not None:
            raise ValueError(
                "forward= was given for a model that is a pair (apply, parameters). Expected it for modules only: "
                "put what it does into apply(parameters, inputs)."
            )
        collections = (
            is_linen(getattr(model[0], "__self__", None)) and isinstance(model[1], Mapping) and "params" in model[1]
        )
        return "function", model[0], model[1], (_in_params if collections else _anywhere)
    if is_nnx(model):
        nnx = sys.modules["flax.nnx"]
        definition, parameters, rest = nnx.split(model, nnx.Param, ...)
        return "nnx", definition, (parameters, rest), lambda path: path[0].idx == 0
    if is_linen(model):
        if model.scope is None:
            raise ValueError(
                f"The Linen module {type(model).__name__} is not bound to variables. Expected "
                "module.bind(variables), or the pair (module.apply, variables). Bind it first."
            )
        module, variables = model.unbind()
        return "linen", module, dict(variables), _in_params
    return "equinox", None, model, _anywhere


def _in_params(path: tuple) -> bool:
    return getattr(path[0], "key", None) == "params"


def _anywhere(path: tuple) -> bool:
    return True


def is_nnx(model: Any) -> bool:
    """Whether it is a Flax NNX module."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(model, nnx.Module)


def is_linen(model: Any) -> bool:
    """Whether it is a Flax Linen module."""
    linen = sys.modules.get("flax.linen")
    return linen is not None and isinstance(model, linen.Module)


def _is_equinox(model: Any) -> bool:
    equinox = sys.modules.get("equinox")
    return equinox is not None and isinstance(model, equinox.Module)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def distinct_names(paths: list[tuple], shown: list[bool], kind: str) -> list[str]:
    """A name for each path in a tree, no two the same: what identifies an array is its path, not a text with dots.

    The shortest is as the user knows a parameter. Where two would be the same, both get a longer one: with what the
    container adds, then as JAX writes the path, then with its number. Arrays that are not `shown`, for they are never
    trained, leave the short names to others.

    >>> key, index = jax.tree_util.DictKey, jax.tree_util.SequenceKey
    >>> distinct_names([(key("enc"), key("w")), (key("enc.w"),), (key("a"), index(0))], [True] * 3, "function")
    ["['enc']['w']", "['enc.w']", 'a.0']
    """
    forms = []
    for number, path in enumerate(paths):
        dotted, exact = jax.tree_util.keystr(path, simple=True, separator=".") or "parameters", _exact(path)
        forms.append((without_container(dotted, kind), dotted, exact, f"{exact} #{number}"))
    level = [0 if own else 2 for own in shown]
    while True:
        names = [form[at] for form, at in zip(forms, level, strict=True)]
        count = Counter(names)
        longer = [n for n, name in enumerate(names) if count[name] > 1 and level[n] < 3]
        if not longer:
            return names
        for n in longer:
            level[n] += 1


def _exact(path: tuple) -> str:
    return jax.tree_util.keystr(path) or "parameters"


def without_container(name: str, kind: str) -> str:
    """Without what only the container adds: NNX's two states and `.value`, Linen's `params`.

    >>> without_container("0.layer.kernel.value", "nnx"), without_container("params.Dense_0.bias", "linen")
    ('layer.kernel', 'Dense_0.bias')
    """
    name = name.removesuffix(".value")
    first, _, rest = name.partition(".")
    return rest if rest and (kind == "nnx" or first == "params") else name
