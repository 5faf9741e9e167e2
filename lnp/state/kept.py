"""Puts back what the code of a model or a loss writes to while it is measured.

Such code writes to more than tensors: it counts calls, appends to a list, keeps its last activations, makes a layer
when it first needs it. `kept` finds every place that can be reached from a model and a loss, and restores it.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from lnp.state.places import PARTS, STATES, ours, own_code, places, references

PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), types.EllipsisType, types.CodeType, property})
PLAIN |= {types.ModuleType, staticmethod, classmethod, types.MemberDescriptorType}
"""Types of what cannot be written to."""
MERE = frozenset({"types", "argparse", "collections", "dataclasses"})
"""Modules of the standard library whose objects are mere containers: what others hold (locks, files) is theirs."""
LINKS = (types.MethodType, types.BuiltinMethodType, types.FunctionType, types.CellType, functools.partial)


@contextlib.contextmanager
def kept(*roots: Any, foreign: frozenset[str] = frozenset()) -> Iterator[None]:
    """What can be reached from the roots holds afterwards what it held before, also after an exception.

    Containers, attributes, closures, the globals that the user's functions name, small arrays of NumPy and random
    states (NumPy's and Python's own, and generators that are found on the way) are put back in place, so that everybody
    who refers to them still does.

    Parameters
    ----------
    roots:
        Models, functions, losses; None is allowed.
    foreign:
        Top-level packages whose objects are not entered.

    Examples
    --------
    >>> calls = []
    >>> with kept(calls):
    ...     calls.append(1)
    >>> calls
    []
    """
    before = Saved(roots, foreign)
    randomness = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's legacy state
    try:
        yield
    finally:
        random.setstate(randomness[0])
        np.random.set_state(randomness[1])  # noqa: NPY002
        before.restore()


class Saved:
    """What everything that can be reached from the roots holds now, to be put back; without random states."""

    def __init__(self, roots: Iterable[Any], foreign: frozenset[str] = frozenset()) -> None:
        self._held = [(part, x, part.take(x)) for x in reachable(roots, foreign) for part in places(x)]

    def restore(self) -> None:
        """Put back what has changed."""
        for part, x, before in self._held:
            if not part.same(part.take(x), before):
                part.put(x, before)


def reachable(roots: Iterable[Any], foreign: frozenset[str] = frozenset()) -> list[Any]:
    """Every object that can be reached from the roots and may be written to, each once."""
    seen: dict[int, Any] = {}
    stack = list(roots)
    while stack:
        x = stack.pop()
        if id(x) in seen or not enters(x, foreign):
            continue
        seen[id(x)] = x
        held = [value for part in places(x) if part.refers for value in part.take(x)]
        stack += [value for value in (*references(x), *held) if type(value) not in PLAIN]
    return list(seen.values())


def enters(x: Any, foreign: frozenset[str] = frozenset()) -> bool:
    """Whether an object is looked into: containers, functions, objects, and the user's own classes."""
    if isinstance(x, type):
        return own_code(x.__module__)
    kind: Any = type(x)
    return entered(kind, foreign)


@functools.lru_cache(maxsize=4096)
def entered(kind: type, foreign: frozenset[str]) -> bool:
    """Whether objects of a type are looked into."""
    if kind in PLAIN:
        return False
    if kind in STATES or kind in LINKS or issubclass(kind, (*PARTS, tuple, frozenset)):
        return True
    root = kind.__module__.partition(".")[0]
    return root in MERE or root == "__main__" or not (root in foreign or root in sys.stdlib_module_names or ours(root))
