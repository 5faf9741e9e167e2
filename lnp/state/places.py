"""The places where Python objects hold something, and how to read and write each kind of them.

Containers, attributes, cells of closures, globals, arrays of NumPy, generators of random numbers: whatever the code of
a model or a loss writes to, beside tensors, is one of these. `lnp.state` puts them back; a backend that runs the user's
code on a copy of its objects makes the copy with `places`, `empty_like` and `references`.
"""

from __future__ import annotations

import collections
import functools
import itertools
import operator
import os
import random
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

LARGEST = 2**22
"""Bytes of a NumPy array up to which its values are kept: running statistics are small, and data sets are only read."""
HEAP = 1 << 9
"""CPython's flag of classes that are made by a `class` statement: those under them know how objects are made."""
NOTHING = object()
"""Stands for a name that has no value."""


def _identical(a: list, b: list) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


@dataclass(frozen=True)
class Part:
    """One kind of place.

    Attributes
    ----------
    take:
        holder -> what it holds, as a list.
    put:
        (holder, list) -> None. Makes the holder hold that instead.
    same:
        Whether two such lists are the same.
    refers:
        Whether the list holds references, which may be followed, or a copy of values.
    """

    take: Callable[[Any], list]
    put: Callable[[Any, list], None]
    same: Callable[[list, list], bool] = _identical
    refers: bool = True


@functools.lru_cache(maxsize=4096)
def is_user_module(module: str | None) -> bool:
    """Whether a module is the user's own: not of the standard library, and not an installed package.

    Globals and attributes of classes are looked at in the user's own code alone: following what the functions of a
    library name would lead through all of it.
    """
    root = (module or "").partition(".")[0]
    if not root or (root in sys.stdlib_module_names and root != "__main__") or is_lnp_or_numpy(root):
        return False
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return not any(folder in file for folder in (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}"))


def is_lnp_or_numpy(root: str) -> bool:
    """Whether a top-level package is one whose state is known: measuring does not change it."""
    return root in ("numpy", "lnp") or root.startswith("lnp_")


def references(x: Any) -> list[Any]:
    """The objects that an object refers to for good: it has no place where another reference could be put."""
    if isinstance(x, types.MethodType):
        return [x.__self__, x.__func__]
    if isinstance(x, types.BuiltinMethodType):  # that of a list, say
        return [x.__self__]
    if isinstance(x, functools.partial):
        return [x.func, *x.args, *x.keywords.values()]
    if isinstance(x, types.FunctionType):
        return [*(x.__closure__ or ()), *(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
    if isinstance(x, type):
        return [*x.__bases__, *(value for value in vars(x).values() if isinstance(value, types.FunctionType))]
    return [*(x if isinstance(x, tuple | frozenset) else ()), type(x)]


def places(x: Any) -> tuple[Part, ...]:
    """The places that an object has. Those of a function are its attributes, and the globals that it names."""
    if isinstance(x, type):
        return (CLASS_ATTRIBUTES,)
    if isinstance(x, types.FunctionType):
        return (ATTRIBUTES, GLOBALS) if is_user_module(x.__module__) else (ATTRIBUTES,)
    kind: Any = type(x)
    return _places_of_type(kind)


@functools.lru_cache(maxsize=4096)
def _places_of_type(kind: type) -> tuple[Part, ...]:
    """The places of objects of one type: of the container that it is, its slots, and its attributes."""
    if kind in STATES:
        return (STATES[kind],)
    parts = [part for base, part in PARTS.items() if issubclass(kind, base)][:1]
    slots = tuple(name for base in kind.__mro__ for name in _slots(base))
    if slots:
        parts.append(_slots_part(slots))
    return (*parts, ATTRIBUTES) if kind.__dictoffset__ else tuple(parts)


def _slots(kind: type) -> list[str]:
    """The names of a class's slots, where Python code has made them: those of others need not be writable."""
    members = vars(kind).items() if "__slots__" in vars(kind) else ()
    return [name for name, value in members if isinstance(value, types.MemberDescriptorType)]


def empty_like(x: Any) -> Any:
    """An object of the same type that holds nothing yet.

    Raises
    ------
    TypeError
        If such objects cannot be made without what they hold.
    """
    kind: Any = type(x)
    if isinstance(x, collections.deque):
        made = collections.deque.__new__(kind)
        collections.deque.__init__(made, (), x.maxlen)
        return made
    # the user's own __new__ may ask for arguments
    made = next(base for base in kind.__mro__ if not base.__flags__ & HEAP).__new__(kind)
    if isinstance(x, collections.defaultdict):
        made.default_factory = x.default_factory
    return made


def global_names(function: types.FunctionType) -> tuple[str, ...]:
    """The names of globals that a function uses, also those that have no value yet."""
    return _names_in(function.__code__)


@functools.lru_cache(maxsize=4096)
def _names_in(code: types.CodeType) -> tuple[str, ...]:
    inner = [name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names_in(const)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))


def _put_globals(x: types.FunctionType, values: list) -> None:
    """Write the globals that a function names; those that had no value are removed."""
    for name, value in zip(global_names(x), values, strict=True):
        if value is not NOTHING:
            x.__globals__[name] = value
        else:
            x.__globals__.pop(name, None)


def _slots_part(names: tuple[str, ...]) -> Part:
    """The place that a class's slots of these names are."""

    def put(x: Any, values: list) -> None:
        for name, value in zip(names, values or [NOTHING] * len(names), strict=True):
            if value is not NOTHING:
                object.__setattr__(x, name, value)
            elif hasattr(x, name):
                object.__delattr__(x, name)

    return Part(lambda x: [getattr(x, name, NOTHING) for name in names], put)


def _take_class(x: type) -> list:
    return _flat((name, value) for name, value in vars(x).items() if not name.startswith("__"))


def _put_class(x: type, values: list) -> None:
    """Write a class's attributes, by `type`'s own methods: a metaclass may have others."""
    before = dict(zip(values[::2], values[1::2], strict=True))
    now = _take_class(x)
    for name in set(now[::2]) - before.keys():
        type.__delattr__(x, name)
    for name, value in before.items():
        if vars(x).get(name, NOTHING) is not value:
            type.__setattr__(x, name, value)


# The methods of the builtin types themselves are called: a subclass of the user's may count, check or refuse writes.


def _put_list(x: list, values: list) -> None:
    list.__setitem__(x, slice(None), values)


def _put_set(x: set, values: list) -> None:
    set.clear(x)
    set.update(x, values)


def _put_deque(x: collections.deque, values: list) -> None:
    collections.deque.clear(x)
    collections.deque.extend(x, values)


def _put_ordered(x: collections.OrderedDict, values: list) -> None:
    collections.OrderedDict.clear(x)
    for key, value in zip(values[::2], values[1::2], strict=True):
        collections.OrderedDict.__setitem__(x, key, value)


def _put_dict(x: dict, values: list) -> None:
    dict.clear(x)  # the order of the keys is part of what it held
    dict.update(x, zip(values[::2], values[1::2], strict=True))


def _take_cell(x: types.CellType) -> list:
    try:
        return [x.cell_contents]
    except ValueError:  # an empty one: the variable has no value yet
        return []


def _put_cell(x: types.CellType, values: list) -> None:
    if values:
        x.cell_contents = values[0]
    elif _take_cell(x):
        del x.cell_contents


def _take_array(x: np.ndarray) -> list:
    return [x.copy()] if x.nbytes <= LARGEST and x.flags.writeable else []


def _put_array(x: np.ndarray, values: list) -> None:
    if values:
        if x.shape != values[0].shape:
            x.resize(values[0].shape, refcheck=False)
        np.copyto(x, values[0])


def _same_array(a: list, b: list) -> bool:
    return not (a and b) or (a[0].shape == b[0].shape and a[0].tobytes() == b[0].tobytes())


def _put_bytes(x: bytearray, values: list) -> None:
    x[:] = values[0]


def _put_generator(x: np.random.Generator, values: list) -> None:
    x.bit_generator.state = values[0]


def _same_state(a: list, b: list) -> bool:
    return repr(a) == repr(b)  # dictionaries with arrays in them


def _flat(items: Iterable[tuple]) -> list:
    return list(itertools.chain.from_iterable(items))


PARTS: dict[type, Part] = {
    collections.OrderedDict: Part(lambda x: _flat(collections.OrderedDict.items(x)), _put_ordered),
    dict: Part(lambda x: _flat(dict.items(x)), _put_dict),
    list: Part(lambda x: list.__getitem__(x, slice(None)), _put_list),
    set: Part(lambda x: list(set.__iter__(x)), _put_set),
    collections.deque: Part(lambda x: list(collections.deque.__iter__(x)), _put_deque),
    bytearray: Part(lambda x: [bytes(x)], _put_bytes, operator.eq, refers=False),
    types.CellType: Part(_take_cell, _put_cell),
    np.ndarray: Part(_take_array, _put_array, _same_array, refers=False),
}
"""The places of containers; the first that fits is the one."""


def _attributes(x: Any) -> dict[str, Any]:
    """What an object holds by name, past code of its own that looks attributes up and may need others for that."""
    return object.__getattribute__(x, "__dict__")


ATTRIBUTES = Part(lambda x: _flat(_attributes(x).items()), lambda x, values: _put_dict(_attributes(x), values))
"""What an object holds by name."""
CLASS_ATTRIBUTES = Part(_take_class, _put_class)
"""What all objects of a class share."""
GLOBALS = Part(lambda x: [x.__globals__.get(name, NOTHING) for name in global_names(x)], _put_globals)
"""What a function finds in its module."""
STATES: dict[type, Part] = {
    random.Random: Part(lambda x: [x.getstate()], lambda x, values: x.setstate(values[0]), operator.eq, refers=False),
    np.random.Generator: Part(lambda x: [x.bit_generator.state], _put_generator, _same_state, refers=False),
    np.random.RandomState: Part(
        lambda x: [x.get_state()], lambda x, values: x.set_state(values[0]), _same_state, refers=False
    ),
}
"""Generators of random numbers, whose place is their state."""
