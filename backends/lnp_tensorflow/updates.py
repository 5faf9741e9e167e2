"""A model as it was before an update, to be measured after it.

Tensors do not change. Variables do, and a module reads its own by itself: for the time of a measurement they get their
old values back. The masks that a step drew are repeated where the numbers come from a `tf.random.Generator` that is an
attribute of the module; those of TensorFlow's global state (`tf.nn.dropout`) are other ones, the same at both ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from lnp.contract.trees import map_leaves
from lnp_tensorflow.model import Arrays, Snapshot, is_module, separate
from lnp_tensorflow.strategies import outside_of_scope


@outside_of_scope()
def snapshot(model: Any) -> Any:
    """The model as it is now: a `Snapshot` of its trained variables, or (function, tensors)."""
    _refuse_graphs()
    structure, _, arrays = separate(model, None, None)
    if structure.kind == "function":
        function, tree = model
        return function, map_leaves(tf.convert_to_tensor, tree)
    values = {name: source.read_value() for name, source in structure.sources(arrays).items()}
    return Snapshot(model, values, tuple((state, state.read_value()) for state in _generators(model)))


@outside_of_scope()
def difference(before: Any, after: Any) -> Arrays:
    """What the update added to each parameter."""
    old, new = _values(before), _values(after)
    if _shapes(old) != _shapes(new):
        raise ValueError(
            f"The model has other trained parameters than before: {_shapes(new)} where there were {_shapes(old)}. "
            "Expected the same model, before and after one update."
        )
    return {name: new[name] - value for name, value in old.items()}


@contextlib.contextmanager
def as_before(before: Snapshot) -> Iterator[None]:
    """The variables have their old values inside, and those of now afterwards, whatever happens."""
    _refuse_graphs()
    structure, _, _ = separate(before.model, None, None)
    variables = structure.sources({})
    old = [*((variables[name], value) for name, value in before.values.items()), *before.states]
    now = [(variable, variable.read_value()) for variable, _ in old]
    try:
        for variable, value in old:
            variable.assign(value)
        yield
    finally:
        for variable, value in now:
            variable.assign(value)


def _values(model: Any) -> Arrays:
    if isinstance(model, Snapshot):
        return model.values
    structure, _, arrays = separate(model, None, None)
    return {name: tf.convert_to_tensor(source) for name, source in structure.sources(arrays).items()}


def _shapes(values: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in values.items()}


def _generators(model: Any) -> list[tf.Variable]:
    """The states of the random generators that are attributes of a module or of its parts."""
    parts = [model, *getattr(model, "submodules", ())] if is_module(model) else []
    found = [value for part in parts for value in vars(part).values() if isinstance(value, tf.random.Generator)]
    return list({id(generator): generator.state for generator in found}.values())


def _refuse_graphs() -> None:
    if tf.inside_function():
        raise ValueError(
            "A model was to be compared before and after an update inside a tf.function, where lnp cannot see to it "
            "that variables are put back. Expected eager code around the traced step. Call the step, and then lnp."
        )
