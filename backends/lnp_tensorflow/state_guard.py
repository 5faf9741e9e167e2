"""Leave no trace: what running the user's Python code might disturb is put back, also when an exception passes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context  # there is no public way to the seeds of eager operations

from lnp.state.places import places
from lnp.state.preserve import preserve_state, reachable_objects

FOREIGN = frozenset({"tensorflow"})
"""Packages whose objects are not entered: variables are put back by what a traced graph writes to."""


@contextlib.contextmanager
def undisturbed(*roots: Any) -> Iterator[None]:
    """What Python objects hold, and all random states outside of graphs, are afterwards as they were before.

    Symbolic tensors that tracing has left in attributes and containers go with it. Random operations in a graph have a
    state of their own, and generators are variables; eager operations draw their seeds from one sequence.
    """
    seeds = eager_seeds()
    state = None if seeds is None else seeds.getstate()
    with preserve_state(*opened(roots), foreign=FOREIGN):
        try:
            yield
        finally:
            if seeds is not None and state is not None:
                seeds.setstate(state)


def opened(roots: Iterable[Any]) -> list[Any]:
    """The roots, and what is hidden in them: dictionaries in TensorFlow's wrappers, functions in `tf.function`s, losses
    in lnp's own.
    """
    found = [root() if isinstance(root, weakref.ref) else root for root in roots]
    new, known = found, {id(root) for root in found}
    while new:
        inner = [value for root in new for value in _hidden(root)]
        for x in reachable_objects(new, FOREIGN):
            inner += [v for part in places(x) if part.refers for held in part.take(x) for v in _hidden(held)]
        new = [value for value in {id(value): value for value in inner}.values() if id(value) not in known]
        known |= {id(value) for value in new}
        found = [*found, *new]
    return found


def _hidden(value: Any) -> list[Any]:
    kind: Any = type(value)
    return [getattr(value, name) for name in _hiding(kind)]


@functools.lru_cache(maxsize=4096)
def _hiding(kind: type) -> tuple[str, ...]:
    """Attributes by which objects of a type lead to what they hide."""
    root = kind.__module__.partition(".")[0]
    if root == "tensorflow":
        return tuple(name for name in ("__wrapped__", "python_function") if hasattr(kind, name))
    return (
        tuple(f.name for f in dataclasses.fields(kind)) if root[:4] == "lnp_" and dataclasses.is_dataclass(kind) else ()
    )


def eager_seeds() -> random.Random | None:
    """What draws the seeds of eager operations; there is none before `tf.random.set_seed`.

    Raises
    ------
    RuntimeError
        If this release of TensorFlow keeps it elsewhere.
    """
    found = getattr(context.context(), "_rng", None)
    if found is None and context.global_seed() is not None:
        raise RuntimeError(
            f"TensorFlow {tf.__version__} keeps the seeds of eager operations where lnp does not find them, so that it "
            "could not put them back. Expected one of the releases that lnp was tested with."
        )
    return found


def refusing_variables() -> contextlib.AbstractContextManager:
    """Where the user's code is an error if it makes variables, as a network does that is built at its first call."""

    def refuse(create: Callable, **given: Any) -> Any:
        raise ValueError(
            "The model or the loss makes variables when it is called: it is not built yet, and what is measured now "
            "would not have all of its parameters. Expected one whose variables exist. Call it once on a batch before."
        )

    return tf.variable_creator_scope(refuse)
