"""Puts back what the code of a model or a loss writes to while it is measured.

Such code writes to more than tensors: it counts calls, appends to a list, keeps its last activations, makes a layer
when it first needs it. `preserve_state` finds every place that can be reached from a model and a loss, and restores it.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import threading
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from lnp.state.places import PARTS, STATES, Part, is_lnp_or_numpy, is_user_module, places, references

PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), types.EllipsisType, types.CodeType, property})
PLAIN |= {types.ModuleType, staticmethod, classmethod, types.MemberDescriptorType}
"""Types whose objects are not searched: nothing can be written to them, or, for modules, it is found elsewhere."""
CONTAINER_MODULES = frozenset({"types", "argparse", "collections", "dataclasses"})
"""Modules of the standard library whose objects are mere containers: what others hold (locks, files) is theirs."""
ONE = threading.RLock()
"""Two threads on one model would each put back what the other has written; random states are the whole process's."""
LINKS = (types.MethodType, types.BuiltinMethodType, types.FunctionType, types.CellType, functools.partial)


@contextlib.contextmanager
def preserve_state(*roots: Any, foreign: frozenset[str] = frozenset()) -> Iterator[None]:
    """Around a call that may write: what the roots lead to holds afterwards what it held before, also after an error.

    Containers, attributes, closures, the globals that the user's functions name, small arrays of NumPy and random
    states (NumPy's and Python's own, and generators that are found on the way) are put back in place, so that everybody
    who refers to them still does. One thread at a time is in here.

    Parameters
    ----------
    roots:
        Models, functions, losses; None is allowed.
    foreign:
        Top-level packages whose objects are not searched.

    Examples
    --------
    >>> calls = []
    >>> with preserve_state(calls):
    ...     calls.append(1)
    >>> calls
    []
    """
    with ONE:
        before = SavedState(roots, foreign)
        python_state = random.getstate()
        numpy_state = np.random.get_state()  # noqa: NPY002 - the user's legacy state
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            before.restore()


class SavedState:
    """The content of every object that the roots lead to, as it is now, to be put back; without random states."""

    def __init__(self, roots: Iterable[Any], foreign: frozenset[str] = frozenset()) -> None:
        self._held = [
            (part, x, part.take(x) if taken is None else taken)
            for x, held in _contents(roots, foreign).values()
            for part, taken in held
        ]

    def restore(self) -> None:
        """Put back what has changed."""
        for part, x, before in self._held:
            if not part.same(part.take(x), before):
                part.put(x, before)


def reachable_objects(roots: Iterable[Any], foreign: frozenset[str] = frozenset()) -> list[Any]:
    """Every object that can be reached from the roots and may be written to, each once."""
    return [x for x, _ in _contents(roots, foreign).values()]


def _contents(roots: Iterable[Any], foreign: frozenset[str]) -> dict[int, tuple[Any, list[tuple[Part, list | None]]]]:
    """{id: (object, its places and the references that they hold)} of what can be reached; None for copies of values,
    which nothing can be reached by.
    """
    found: dict[int, tuple[Any, list[tuple[Part, list | None]]]] = {}
    stack = list(roots)
    while stack:
        x = stack.pop()
        if id(x) in found or not _is_searched(x, foreign):
            continue
        held = [(part, part.take(x) if part.refers else None) for part in places(x)]
        found[id(x)] = x, held
        stack += [value for value in references(x) if type(value) not in PLAIN]
        stack += [value for _, taken in held for value in taken or () if type(value) not in PLAIN]
    return found


def _is_searched(x: Any, foreign: frozenset[str]) -> bool:
    """Whether the search goes on inside of an object: of containers, functions, objects, and the user's classes."""
    if isinstance(x, type):
        return is_user_module(x.__module__)
    kind: Any = type(x)
    return is_searched_type(kind, foreign)


@functools.lru_cache(maxsize=4096)
def is_searched_type(kind: type, foreign: frozenset[str]) -> bool:
    """Whether the search goes on inside of objects of a type."""
    if kind in STATES or kind in LINKS or issubclass(kind, (*PARTS, tuple, frozenset)):
        return True
    root = kind.__module__.partition(".")[0]
    if root in CONTAINER_MODULES or root == "__main__":
        return True
    return not (root in foreign or root in sys.stdlib_module_names or is_lnp_or_numpy(root))
