"""Finds the backend of a model. Nothing is imported that the user has not imported.

A backend is a module that a distribution names under the entry-point group `lnp.backends`, with the import name of its
framework as the entry's name. `lnp.contract.backend.Backend` says what it offers.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lnp.contract.backend import Backend
from lnp.contract.options import Options

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

GROUP = "lnp.backends"


def evaluate(computation: Callable, model: Any, batches: tuple, options: Options, **operands: Any) -> Any:
    """What a computation makes of a model linearised on each batch, by the model's backend."""
    return find(model).evaluate(computation, model, batches, options, **operands)


def find(model: Any) -> Backend:
    """The backend that accepts the model.

    Raises
    ------
    TypeError
        If none does. The message says which frameworks are loaded and which extra is missing.
    """
    entries = _entries()
    loaded = [entry for entry in entries if entry.name in sys.modules]
    for entry in sorted(loaded, key=_turn):
        backend = entry.load()
        if backend.accepts(model):
            return backend
    raise TypeError(_unknown(model, [entry.name for entry in entries], [entry.name for entry in loaded]))


def load(framework: str) -> Backend:
    """The backend of a framework by its import name, for tools that choose the framework themselves.

    Raises
    ------
    ValueError
        If lnp has no such backend.
    ImportError
        If the framework is not installed.
    """
    entries = {entry.name: entry for entry in _entries()}
    if framework not in entries:
        raise ValueError(f"No lnp backend for {framework!r}. Expected one of {', '.join(sorted(entries))}.")
    return entries[framework].load()


def _turn(entry: EntryPoint) -> int:
    """Keras is asked first, for its models are also modules of the framework under it; NumPy last."""
    return {"keras": 0, "numpy": 2}.get(entry.name, 1)


def _entries() -> EntryPoints:
    return _entries_on(tuple(sys.path))


@functools.cache
def _entries_on(path: tuple[str, ...]) -> EntryPoints:
    """Remembered, since reading every distribution's metadata takes milliseconds."""
    from importlib.metadata import entry_points  # takes longer to import than all of lnp

    return entry_points(group=GROUP)


def _unknown(model: Any, names: list[str], loaded: list[str]) -> str:
    """The error for a model that no backend accepts: which frameworks are loaded, and which is missing."""
    root = type(model).__module__.partition(".")[0]
    received = f"lnp.decompose received a model of type {type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, tuple):
        received += f" with items of types {', '.join(type(item).__name__ for item in model)}"
    expected = (
        "Expected a torch.nn.Module, a tf.Module, a Keras model, a Flax NNX or Equinox module, a bound Flax Linen "
        "module, a model of lnp_numpy, or (apply, parameters) with a function apply(parameters, inputs) and its "
        "framework's arrays."
    )
    missing = [name for name in names if name not in loaded]
    remedy = f"Loaded frameworks: {', '.join(loaded) or 'none'}; "
    if root in missing:
        return (
            f"{received}. {expected} {remedy}import {root} before calling lnp, or install it: "
            f"pip install 'lnp[{root}]'."
        )
    return (
        f"{received}, which no backend accepts. {expected} {remedy}lnp has backends for {', '.join(sorted(names))}. "
        "A framework has to be installed (pip install 'lnp[torch]') and imported before its models are recognised."
    )
