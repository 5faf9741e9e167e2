"""Finds the backend of a model. Nothing is imported that the user has not imported.

A backend is a module that a distribution names under the entry-point group `lnp.backends`, with the import name of its
framework as the entry's name. `lnp.contract.backend.Backend` says what it offers. A model goes to the first backend
that accepts it: lnp's own are asked first, then those of other distributions, of which one that fails is passed over.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lnp.contract.backend import Backend
from lnp.contract.foreign import tell_inputs, why_foreign
from lnp.contract.options import Options
from lnp.user_warnings import warn

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "lnp.backends"
VERBS = ("accepts", "evaluate", "linearize")
"""What a backend has at least: see `lnp.contract.backend.Backend`."""
_TOLD: set[str] = set()
"""What was passed over with a warning."""


def evaluate(computation: Callable, model: Any, batches: tuple, options: Options, **operands: Any) -> Any:
    """What a computation makes of a model linearised on each batch, by the model's backend.

    Raises
    ------
    TypeError
        Without a seed, for a model that no backend accepts, and for a batch that fails and holds no arrays of the
        framework.
    """
    if options.seed is None:  # backends say so of what they draw no signs for
        raise TypeError("seed is None. Expected an integer >= 0, or a key of the framework. Leave it out for 0.")
    backend = find(model)
    try:
        return backend.evaluate(computation, model, batches, options, **operands)
    except Exception as error:
        reason = why_foreign(batches, backend, error)
        if reason is None:
            tell_inputs(batches, error)
            raise
        raise TypeError(reason) from error


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
        backend = _accepting(entry, model)
        if backend is not None:
            return backend
    raise TypeError(_unknown(model, [entry.name for entry in entries], [entry.name for entry in loaded]))


def _accepting(entry: EntryPoint, model: Any) -> Backend | None:
    """The entry's backend if it accepts the model. One of another distribution that fails is told once, and passed
    over.
    """
    if _is_own(entry):
        backend = entry.load()
        return backend if backend.accepts(model) else None
    try:
        backend = entry.load()
        missing = [verb for verb in VERBS if not callable(getattr(backend, verb, None))]
        if missing:
            raise TypeError(f"it has no {', '.join(missing)}")
        return backend if backend.accepts(model) else None
    except (Exception, SystemExit) as error:  # whatever somebody's module, or its dependencies, raises
        _tell(f"the backend {entry.value!r} for {entry.name!r}", error)
        return None


def _tell(what: str, error: BaseException) -> None:
    """Warn once of something that another distribution has registered."""
    if what not in _TOLD:
        _TOLD.add(what)
        warn(
            f"lnp passes over {what}, which another distribution has registered under {GROUP}: "
            f"{type(error).__name__}: {error}. Update or uninstall that distribution."
        )


def process_number() -> int | None:
    """The number of this process among those that a loaded framework computes with as one; None for one process."""
    entries = [entry for entry in _entries() if entry.name in sys.modules and _is_own(entry)]
    found = [verb() for entry in entries if (verb := getattr(entry.load(), "process_number", None))]
    return next((number for number in found if number is not None), None)


def load(framework: str) -> Backend:
    """The backend of a framework by its import name, for tools that choose the framework themselves.

    Raises
    ------
    ValueError
        If lnp has no such backend.
    ImportError
        If the framework is not installed.
    """
    entries = {entry.name: entry for entry in sorted(_entries(), key=_turn, reverse=True)}  # lnp's own is the last
    if framework not in entries:
        raise ValueError(f"No lnp backend for {framework!r}. Expected one of {', '.join(sorted(entries))}.")
    return entries[framework].load()


def _turn(entry: EntryPoint) -> tuple[bool, int]:
    """lnp's own backends are asked before those of other distributions, which may accept anything. Of its own Keras is
    first, for its models are also modules of the framework under it, and NumPy last.
    """
    return not _is_own(entry), {"keras": 0, "numpy": 2}.get(entry.name, 1)


def _is_own(entry: EntryPoint) -> bool:
    """Whether it is one of the backends that come with lnp."""
    own = f"lnp_{entry.name}"
    return getattr(entry, "value", own) == own


def _entries() -> list[EntryPoint]:
    return _entries_on(tuple(sys.path))


@functools.cache
def _entries_on(path: tuple[str, ...]) -> list[EntryPoint]:
    """Remembered, since reading every distribution's metadata takes milliseconds."""
    from importlib.metadata import distributions, entry_points  # takes longer to import than all of lnp

    try:
        return list(entry_points(group=GROUP))
    except Exception:  # one distribution's list cannot be read: the others one by one
        found: dict[tuple[str, str], EntryPoint] = {}
        for distribution in distributions():
            try:
                found |= {(entry.name, entry.value): entry for entry in distribution.entry_points.select(group=GROUP)}
            except Exception as error:
                _tell(f"the entry points of {distribution.metadata['Name']!r}", error)
        return list(found.values())


def _unknown(model: Any, names: list[str], loaded: list[str]) -> str:
    """The error for a model that no backend accepts: which frameworks are loaded, and which is missing."""
    root = type(model).__module__.partition(".")[0]
    received = f"lnp.decompose received a model of type {type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, tuple):
        received += f" with items of types {', '.join(type(item).__name__ for item in model)}"
    if hint := _mistaken(model):
        return f"{received}, which no backend accepts. {hint}"
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


def _mistaken(model: Any) -> str | None:
    """What was probably meant by something that is no model, and what to do."""
    if isinstance(model, type):
        return f"Expected a model, not its class {model.__qualname__}. Make one: {model.__qualname__}(...)."
    if isinstance(model, list | tuple) and len(model) == 2:
        if callable(model[1]) and not callable(model[0]):
            return "Expected (apply, parameters), the function first. Swap the two."
        if callable(model[0]) and isinstance(model, list):
            return "Expected a tuple, (apply, parameters). Put the two into parentheses."
    if isinstance(model, list | tuple) and not any(map(callable, model)):
        return "Expected a model, and then the batch. Are the two swapped?"
    if callable(model) and hasattr(model, "__self__"):
        return (
            "Expected the model itself. Pass the object that the method belongs to, and where the method is another "
            "one than its call, forward=lambda model, inputs: model.method(inputs)."
        )
    if inspect.isfunction(model):
        return "Expected a model, or a function together with its parameters. Pass (apply, parameters)."
    return None
