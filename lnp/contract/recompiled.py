"""Notices what makes a framework compile a measurement again and again: new functions, and batches of other shapes."""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from lnp.user_warnings import warn

REPEATS = 3
"""Compilations for the same code in new function objects after which the user is told."""
SIZES = 16
"""Different shapes for one model after which the user is told: more than a sweep over batch sizes has."""
REMEMBERED = 256
_FUNCTIONS: OrderedDict[Any, tuple[weakref.ref, int]] = OrderedDict()
_SHAPES: OrderedDict[Hashable, frozenset] = OrderedDict()


def compiled(functions: Sequence[Any], measured: Hashable, shapes: Hashable, kept: int) -> tuple[str, ...]:
    """Notes on a measurement that was just compiled, if others like it were compiled before; one warning for each.

    Parameters
    ----------
    functions:
        The user's functions that it was compiled for; anything else among them is passed over.
    measured:
        What was measured, and of which model.
    shapes:
        Those of parameters and batches.
    kept:
        How many compiled measurements the backend keeps.
    """
    notes = [note for function in functions for note in _same_code(function)]
    return (*notes, *_other_shapes(measured, shapes, kept))


def keep_last(memory: OrderedDict, key: Hashable, value: Any, count: int) -> None:
    """Keep the latest few."""
    memory[key] = value
    while len(memory) > count:
        memory.popitem(last=False)


def _same_code(function: Any) -> Iterator[str]:
    """A note if this function was compiled for again and again, each time as a new object with the same code."""
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    code = getattr(inner, "__code__", None)
    if code is None or getattr(inner, "__self__", None) is not None:
        return
    last, count = _FUNCTIONS.pop(code, (None, 0))
    count += last is not None and last() is not function
    keep_last(_FUNCTIONS, code, (weakref.ref(function), count), REMEMBERED)
    if count >= REPEATS:
        text = (
            f"lnp compiled again because {inner.__qualname__} is a new function object, as {count} times before. "
            "If it is made in a loop, define it once, outside, and pass the same object."
        )
        if count == REPEATS:
            warn(text)
        yield text


def _other_shapes(measured: Hashable, shapes: Hashable, kept: int) -> Iterator[str]:
    """A note if one measurement of one model was compiled for again and again, each time for other shapes."""
    before = _SHAPES.pop(measured, frozenset())
    seen = before | {shapes}
    keep_last(_SHAPES, measured, seen, REMEMBERED)
    if len(seen) >= SIZES:
        text = (
            f"lnp has compiled this measurement for {len(seen)} different shapes of batches and parameters. That takes "
            f"time, and memory for the code of the last {kept}. Measure batches of one size: leave out a last, smaller "
            "one, or pad them."
        )
        if len(seen) == SIZES > len(before):
            warn(text)
        yield text
