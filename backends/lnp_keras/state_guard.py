"""Leave no trace: what running a model's Python code might disturb is put back, also when an exception passes.

Keras's own variables need no care here: models run in a scope that takes what is written to them, and drops it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import keras
from keras.src.backend.common import global_state  # there is no public way to what Keras keeps for the thread

import lnp
from lnp.state.places import places
from lnp.state.preserve import preserve_state, reachable_objects

FOREIGN = frozenset({"tensorflow", "jax", "jaxlib", "torch"})
"""Packages whose objects are not entered."""
VARIABLE: type = next(
    base for base in keras.Variable.__mro__ if base.__module__ == "keras.src.backend.common.variables"
)
"""What all variables of Keras are; up to Keras 3.6 those of layers are no `keras.Variable`."""
UNMADE = "uninitialized_variables"
"""Under which name Keras keeps variables that were made in a scope without state."""


@contextlib.contextmanager
def unchanged(*roots: Any) -> Iterator[None]:
    """What Python objects hold, Keras's own state of this thread and the random states are as before afterwards."""
    with preserve_state(*_opened(roots), vars(global_state.GLOBAL_STATE_TRACKER), foreign=FOREIGN):
        yield


def _opened(roots: Iterable[Any]) -> list[Any]:
    """The roots, with what lnp's own wrappers and those of TensorFlow hide."""
    found: list[Any] = []
    for given in roots:
        root: Any = given() if isinstance(given, weakref.ref) else given
        own = type(root).__module__.startswith("lnp_") and dataclasses.is_dataclass(root)
        found += _opened(getattr(root, field.name) for field in dataclasses.fields(root)) if own else [root]
    if keras.backend.backend() != "tensorflow":
        return found
    from lnp_tensorflow.state_guard import opened

    return opened(found)


def untouched() -> contextlib.AbstractContextManager:
    """The random states of the framework that Keras runs on are as before afterwards, where it has any."""
    return getattr(lnp.load(keras.backend.backend()), "untouched", contextlib.nullcontext)()


@contextlib.contextmanager
def foreign_variables_kept(*roots: Any) -> Iterator[None]:
    """On TensorFlow, variables that are not Keras's have their values afterwards, for passes outside of a graph."""
    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    held = [
        value
        for x in reachable_objects(_opened(roots), FOREIGN)
        if not isinstance(x, VARIABLE)
        for part in places(x)
        if part.refers
        for value in part.take(x)
    ]
    before = [(v, v.read_value()) for v in {id(v): v for v in held if isinstance(v, tf.Variable)}.values()]
    try:
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


class Scope(keras.StatelessScope):
    """Takes what a pass writes to Keras's variables.

    Attributes
    ----------
    updates:
        {id of a variable: (the variable, its new value)}.
    overwritten:
        Whether a trained variable was among them.
    """

    def __init__(self, mapping: list, trained: Iterable[Any] = ()) -> None:
        super().__init__(mapping, collect_losses=True, initialize_variables=False)
        self._trained = {id(variable) for variable in trained}
        self.updates: dict[int, tuple[Any, Any]] = {}
        self.overwritten = False

    def __enter__(self) -> Scope:
        self._made = len(_unmade())
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        own = getattr(global_state.get_global_attribute("global_seed_generator"), "state", None)
        made = [variable.path for variable in _unmade()[self._made :] if variable is not own]
        if made and exception[0] is None:
            raise ValueError(
                f"The model or the loss makes variables when it is called ({', '.join(made[:4])}): it is not built "
                "yet, and what is measured now would not have all of its parameters. Expected one whose variables "
                "exist. Call it once on a batch before."
            )

    def add_update(self, update: tuple) -> None:
        """Where variables are written in place, on TensorFlow and PyTorch, no gradient goes through what is written.

        That of a variable which is trained is then taken at what a layer wrote to it.
        """
        variable, value = update
        self.updates[id(variable)] = update
        trained = id(variable) in self._trained
        self.overwritten = self.overwritten or trained
        if keras.backend.backend() != "jax":
            start = self.get_current_value(variable) if trained else None
            value = keras.ops.stop_gradient(value)
            value = value if start is None else value + (start - keras.ops.stop_gradient(start))
        super().add_update((variable, value))


def _unmade() -> list:
    return global_state.get_global_attribute(UNMADE, []) or []
