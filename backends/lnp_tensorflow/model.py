"""What a model is here: a hashable structure, and the tensors or variables that it is differentiated by."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from lnp.contract.trees import by_unique_name, children, leaves, map_leaves
from lnp.contract.validation import select
from lnp.state.fingerprint import fingerprint
from lnp_tensorflow.state_guard import FOREIGN, opened

Arrays = dict[str, tf.Tensor]


@dataclass(frozen=True)
class Structure:
    """All of a model that is not a tensor. Models of equal structure share traced code.

    Attributes
    ----------
    kind:
        "function": function(parameters, inputs), differentiated by tensors. "variables": differentiated by the
        variables that the model reads by itself.
    static:
        The function; a module by a weak reference, so that traced code does not keep it alive.
    template:
        Of the parameters' tree, as text: equal trees share traced code.
    names:
        Of the tree's leaves.
    trained:
        The names that are differentiated.
    variables:
        The trained variables, as hashable references in the order of `trained`.
    state:
        What the model's Python objects hold: constants in traced code.
    forward:
        The user's (model, inputs) -> outputs, or None.
    autograph:
        Whether Python control flow over tensors has to be converted.
    """

    kind: str
    static: Any
    template: str
    names: tuple[str, ...]
    trained: tuple[str, ...]
    variables: tuple[Any, ...] = ()
    state: tuple = ()
    forward: Callable | None = None
    autograph: bool = False

    @property
    def roots(self) -> tuple[Any, ...]:
        """The user's objects that a call may write to."""
        return self.static, self.forward

    def sources(self, arrays: Arrays) -> dict[str, Any]:
        """{name: what is differentiated by}."""
        if self.kind == "function":
            return {name: arrays[name] for name in self.trained}
        return {name: reference.deref() for name, reference in zip(self.trained, self.variables, strict=True)}

    def call(self, tree: Any, arrays: Arrays, inputs: Any) -> Any:
        """The outputs. `tree` is any tree of the parameters' structure."""
        if self.kind == "function":
            values = iter([arrays[name] for name in self.names])
            return self._run(self.static, map_leaves(lambda _: next(values), tree), inputs)
        model = self.static() if isinstance(self.static, weakref.ref) else self.static
        return self._run(self.forward or called, model, inputs)

    def _run(self, function: Callable, *args: Any) -> Any:
        if not self.autograph:
            return function(*args)
        return tf.function(lambda: function(*args))()


@dataclass(frozen=True)
class Snapshot:
    """A model that reads its variables by itself, with other values of them: those from before an update.

    Attributes
    ----------
    model:
        The user's module, or (function, variables).
    values:
        Of the trained variables, by name.
    states:
        (variable, value) of the random generators among a module's attributes.
    """

    model: Any
    values: Arrays
    states: tuple[tuple[tf.Variable, tf.Tensor], ...] = ()


def accepts(model: Any) -> bool:
    """Whether the model is a module, or a function with parameters among which are variables or tensors."""
    if is_module(model) or isinstance(model, Snapshot):
        return True
    if not (isinstance(model, tuple) and len(model) == 2 and callable(model[0])):
        return False
    return any(_is_tensor(value) for value in leaves(model[1]))


def is_module(model: Any) -> bool:
    """A `tf.Module` or another object that tracks its variables, as a loaded SavedModel, or a callable with
    trainable variables.
    """
    if isinstance(model, tf.Module | tf.__internal__.tracking.AutoTrackable):
        return True
    variables = getattr(model, "trainable_variables", None) if callable(model) else None
    return isinstance(variables, list | tuple) and all(isinstance(v, tf.Variable) for v in variables)


def separate(model: Any, forward: Callable | None, parameters: Any) -> tuple[Structure, Any, Arrays]:
    """A model's structure, the tree of its parameters, and their tensors by name.

    Raises
    ------
    TypeError
        For parameters that are no tensors.
    ValueError
        For a model without trainable or selected parameters.
    """
    if is_module(model):
        variables = {n: v for n, v in named_variables(model).items() if v.trainable or parameters is not None}
        variables = {n: v for n, v in variables.items() if v.dtype.is_floating or (v.dtype.is_complex and v.trainable)}
        return _of_variables(weakref.ref(model), variables, parameters, forward, plain_state(model, forward)), None, {}
    if forward is not None:
        raise ValueError(
            "forward= was given for a model that is a pair (function, parameters). Expected it for modules only: put "
            "what it does into the function."
        )
    function, tree = model
    named_leaves = named(tree)
    _refuse_others(named_leaves)
    first = first_names(named_leaves)
    numbers = {n: v for n, v in named_leaves.items() if first[n] == n and (v.dtype.is_floating or v.dtype.is_complex)}
    numbers = {n: v for n, v in numbers.items() if parameters is not None or getattr(v, "trainable", True)}
    if _closes_over_variables(function, named_leaves.values()):
        return _of_variables(function, numbers, parameters, called, plain_state(function)), None, {}
    trained = _real(numbers, select(numbers, parameters))
    template = str(map_leaves(lambda leaf: "*", tree))
    arrays = {name: tf.convert_to_tensor(leaf) for name, leaf in named_leaves.items() if first[name] == name}
    state = plain_state(function)
    names = tuple(first.values())
    return Structure("function", function, template, names, tuple(trained), state=state), tree, arrays


def first_names(named_leaves: Mapping[str, Any]) -> dict[str, str]:
    """{name: the first name of the same variable}: one that is there twice is one parameter."""
    seen: dict[int, str] = {}
    return {name: seen.setdefault(id(leaf), name) for name, leaf in named_leaves.items()}


def _refuse_others(named_leaves: Mapping[str, Any]) -> None:
    """Raise TypeError for leaves that are neither tensors nor variables, by their names."""
    wrong = [f"{name} ({type(leaf).__name__})" for name, leaf in named_leaves.items() if not _is_tensor(leaf)]
    if wrong:
        raise TypeError(
            f"The parameters {', '.join(wrong[:8])} are no tensors. Expected tf.Tensors and tf.Variables only. Put "
            "what is no parameter into the function, or convert it by tf.constant."
        )


def _real(parameters: Mapping[str, Any], picked: list[str]) -> list[str]:
    """The names that were picked; raises ValueError for complex ones, whose part in the rate would be missing."""
    wrong = [name for name in picked if parameters[name].dtype.is_complex]
    if wrong:
        raise ValueError(
            f"The parameters {wrong[:4]} are complex. Expected real ones. Hold real and imaginary parts as two "
            "parameters, and join them by tf.complex where they are used."
        )
    return picked


def called(model: Callable, inputs: Any) -> Any:
    """model(x), model(*tuple) or model(**dict)."""
    if not callable(model):
        raise TypeError(
            f"The model is a {type(model).__name__} that cannot be called. Expected one with __call__. Pass forward=, "
            "a function (model, inputs) -> outputs."
        )
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, list | tuple):
        return model(*inputs)
    return model(inputs)


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a structure by their dotted path, in their order."""
    return by_unique_name(_paths(tree, ""))


def _paths(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf) pairs. Two paths may read the same: {"a": {"w": ...}, "a.w": ...}."""
    inner = children(tree)
    if inner is None:
        yield prefix or "parameters", tree
        return
    for key, child in inner.items():
        yield from _paths(child, f"{prefix}.{key}" if prefix else key)


def named_variables(module: Any) -> dict[str, tf.Variable]:
    """{dotted path of attributes: variable}, each variable once.

    What is not found among the attributes, as in a loaded SavedModel, is known by its own name.
    """
    found: list[tuple[str, tf.Variable]] = []
    seen: set[int] = set()

    def visit(value: Any, path: str) -> None:
        if isinstance(value, tf.Variable):
            if id(value) not in seen:
                seen.add(id(value))
                found.append((path, value))
            return
        if value is module or isinstance(value, tf.Module | tf.__internal__.tracking.AutoTrackable):
            inner = {} if id(value) in seen else vars(value)
            seen.add(id(value))
        else:
            inner = (children(value) or {}) if isinstance(value, Mapping | list | tuple) else {}
        for key, child in inner.items():
            if str(key).startswith("_self_"):  # what TensorFlow keeps on a module for its own use
                continue
            visit(child, f"{path}.{key}" if path else str(key))

    visit(module, "")
    listed = getattr(module, "variables", None) or getattr(module, "trainable_variables", None)
    own = {id(v): v for v in ([v for _, v in found] if listed is None else listed)}
    reached = [(path, v) for path, v in found if id(v) in own]
    hidden = [(v.name.partition(":")[0].replace("/", "."), v) for key, v in own.items() if key not in seen]
    return by_unique_name([*reached, *hidden])


def plain_state(*roots: Any) -> tuple:
    """What can be reached from a model, a function or a loss and is no variable: traced code holds it as constants."""

    def held(value: Any) -> Any:
        return value.ref() if isinstance(value, tf.Tensor | tf.Variable) else type(value).__qualname__

    return fingerprint(opened(roots), FOREIGN, held)


def _of_variables(static: Any, variables: dict, parameters: Any, forward: Callable | None, state: tuple) -> Structure:
    trained = _real(variables, select(variables, parameters))
    replicated = any(isinstance(v, tf.distribute.DistributedValues) for v in variables.values())
    if replicated and tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context():
        raise ValueError(
            "lnp was called inside of strategy.scope(), where variables have no one replica's values. Expected a call "
            "outside of the scope or inside of strategy.run. Leave the `with` block first."
        )
    references = tuple(variables[name].ref() for name in trained)
    return Structure("variables", static, "", (), tuple(trained), references, state, forward)


def _closes_over_variables(function: Callable, parameters: Iterable[Any]) -> bool:
    """Whether function(inputs) reads its variables by itself, where others are function(parameters, inputs)."""
    inputs = getattr(function, "structured_input_signature", None)
    if inputs is not None:  # of a concrete function, whose Python signature tells nothing
        return len(inputs[0]) + len(inputs[1]) == 1
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.VAR_POSITIONAL for p in found) or sum(p.default is p.empty for p in positional) != 1:
        return False
    return len(positional) == 1 or all(isinstance(value, tf.Variable) for value in parameters)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, tf.Variable) or tf.is_tensor(value)
