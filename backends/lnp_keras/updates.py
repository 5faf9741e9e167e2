"""A model as it was before an update, to be measured after it: the same function of the old values of its variables.

The seeds of dropout are variables, so that its masks are those of the step. They are other ones, the same at both ends,
on PyTorch, where Keras draws from the framework's own generator, and on TensorFlow where the step is compiled by XLA,
which makes other numbers of the same seeds.
"""

from __future__ import annotations

from typing import Any

import keras

from lnp_keras.model import Snapshot, named_variables, selected, stateless


def snapshot(model: keras.Layer) -> Snapshot:
    """The model as it is now: copies of all its variables."""
    stateless(model, None)  # raises for a model that cannot be measured
    return Snapshot(model, _values(model))


def difference(before: Snapshot, after: Any) -> dict[str, Any]:
    """What the update added to each trained variable."""
    old = _trained(before)
    new = _trained(after)
    if {n: tuple(v.shape) for n, v in old.items()} != {n: tuple(v.shape) for n, v in new.items()}:
        raise ValueError(
            f"The model has other trained variables than before: {sorted(new)} where there were {sorted(old)}, or of "
            "other shapes. Expected the same model, before and after one update."
        )
    return {name: new[name] - value for name, value in old.items()}


def _trained(model: Any) -> dict[str, Any]:
    now = isinstance(model, keras.Layer)
    values = _values(model) if now else model.values
    return {name: values[name] for name in selected(model if now else model.model, None)}


def _values(model: keras.Layer) -> dict[str, Any]:
    """Copies, since a framework may write over what a variable held, or give its memory away."""
    variables = named_variables(model).items()
    return {name: keras.ops.stop_gradient(keras.ops.copy(variable.value)) for name, variable in variables}
