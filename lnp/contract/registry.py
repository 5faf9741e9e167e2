"""Finds the backend of a model. Nothing is imported that the user has not imported.

A backend is a module that a distribution names under the entry-point group `lnp.backends`, with the import name of its
framework as the entry's name. It offers

    accepts(model) -> bool
    evaluate(computation, model, batches, options, *, learning_rate=None, update=None) -> Any
    linearize(model, batch, options) -> Linearization

`evaluate` linearises the model on each batch, calls `computation(*linearizations, **operands)`, compiled where the
framework compiles, and leaves no trace on the model. It raises the errors of the records' `violations`, and returns
what the computation returned with every array of shape () as a number, brought to the host in one transfer; inside a
compiled function, where arrays have no value yet, it returns them as they are. `linearize` hands out the record
itself, for eager work.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

GROUP = "lnp.backends"
BATCH_STATISTICS = ("frozen", "coupled")


@dataclass(frozen=True)
class Options:
    """How a model is linearised; what `lnp.decompose` was told, for the backend.

    Attributes
    ----------
    loss:
        Callable, name, or None to infer it.
    forward:
        (model, inputs) -> outputs, or None to call the model itself.
    parameters:
        Which parameters to differentiate: a predicate on names, a glob, names, or None for all trainable ones.
    seed:
        Of the random signs; in JAX also a PRNG key.
    loss_terms:
        The user's own n, or None.
    microbatch:
        Samples that are in memory at a time, or None for the whole batch.
    batch_statistics:
        "frozen" (batch normalisation in training mode keeps this batch's statistics) or "coupled".
    split:
        Whether the samples may be taken one at a time.
    population:
        Whether the squared norms of the loss gradient's samples will be asked for, beside the gradient; None for where
        they are cheap and the loss is separable.

    Raises
    ------
    ValueError
        For other batch statistics, and for a micro-batch, a number of terms or a seed that cannot be.
    """

    loss: str | Callable | None = None
    forward: Callable | None = None
    parameters: Any = None
    seed: Any = 0
    loss_terms: int | None = None
    microbatch: int | None = None
    batch_statistics: str = "frozen"
    split: bool = True
    population: bool | None = None

    def __post_init__(self) -> None:
        if self.batch_statistics not in BATCH_STATISTICS:
            known = ", ".join(map(repr, BATCH_STATISTICS))
            raise ValueError(f"batch_statistics is {self.batch_statistics!r}. Expected one of {known}.")
        if self.microbatch is not None and not (isinstance(self.microbatch, int) and self.microbatch >= 1):
            raise ValueError(f"microbatch is {self.microbatch!r}. Expected a number of samples >= 1, or None.")
        if isinstance(self.loss_terms, int | float) and not self.loss_terms > 0:
            raise ValueError(f"loss_terms is {self.loss_terms!r}. Expected the number of terms that the loss averages.")
        if isinstance(self.seed, int) and self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}. Expected an integer >= 0.")


def evaluate(computation: Callable, model: Any, batches: tuple, options: Options, **operands: Any) -> Any:
    """What a computation makes of a model linearised on each batch, by the model's backend."""
    return find(model).evaluate(computation, model, batches, options, **operands)


def find(model: Any) -> Any:
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


def load(framework: str) -> Any:
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


def _turn(entry: Any) -> int:
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
