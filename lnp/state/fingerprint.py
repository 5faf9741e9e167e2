"""What Python objects hold, as one hashable value: code that was traced for it holds it as constants."""

from __future__ import annotations

import functools
import hashlib
import random
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from lnp.state.places import STATES, places
from lnp.state.preserve import PLAIN, reachable_objects

BLOCK = 2**19
"""Bytes of an array that are summed together."""
LARGE = 2**21
"""Bytes of an array from which on they are."""


def fingerprint(
    roots: Iterable[Any], foreign: frozenset[str] = frozenset(), held: Callable[[Any], Any] = lambda value: None
) -> tuple:
    """Equal where what can be reached from the roots is the same: plain values, arrays of NumPy, states of generators,
    and functions, which are told apart by identity.

    Parameters
    ----------
    roots:
        Models, functions, losses.
    foreign:
        Top-level packages whose objects are not searched.
    held:
        value -> a hashable key of a value that is not searched, such as a framework's tensor; None for no key.

    Examples
    --------
    >>> scale = [1.0]
    >>> before = fingerprint([scale])
    >>> scale[0] = 2.0
    >>> before == fingerprint([scale])
    False
    """
    objects = reachable_objects(roots, foreign)
    position = {id(x): index for index, x in enumerate(objects)}  # an address may be taken again, a position not

    def key(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.shape, value.dtype.str, _content(value)
        if type(value) in PLAIN:
            # 1 == True == 1.0, 0.0 == -0.0, and nan is not even equal to itself
            return type(value), repr(value) if isinstance(value, float | complex) else value
        return position[id(value)] if id(value) in position else held(value)

    return tuple(
        (
            weakref.ref(x) if isinstance(x, types.FunctionType) else type(x),
            repr(part.take(x)) if type(x) in STATES else tuple(map(key, part.take(x))),
        )
        for x in objects
        for part in places(x)
    )


def _content(array: np.ndarray) -> str:
    """A digest of all of an array's bytes.

    Of a large one, which may be a data set, each block of words is summed with odd weights, modulo 2^64: at the speed
    at which memory is read, five times that of a cryptographic digest, and every change of one number shows.
    """
    if array.nbytes < LARGE or array.dtype.hasobject or not (array.flags.c_contiguous or array.flags.f_contiguous):
        return hashlib.sha256(array.tobytes()).hexdigest()
    content = array.ravel(order="K").view(np.uint8)
    whole = content.size // BLOCK * BLOCK
    words, weights = content[:whole].view(np.uint64).reshape(-1, BLOCK // 8), _weights()
    found = hashlib.sha256(np.asarray([np.dot(block, weights) for block in words]).tobytes())
    found.update(content[whole:].tobytes())
    return f"{'C' if array.flags.c_contiguous else 'F'} {found.hexdigest()}"


@functools.cache
def _weights() -> np.ndarray:
    return np.random.default_rng(0).integers(2**63, size=BLOCK // 8, dtype=np.uint64) * 2 + 1


def random_states(roots: Iterable[Any], foreign: frozenset[str] = frozenset()) -> str:
    """The random states of Python and NumPy, and of the generators that can be reached, as text to compare."""
    generators = [x for x in reachable_objects(roots, foreign) if type(x) in STATES]
    own = [part.take(x) for x in generators for part in places(x)]
    return repr((random.getstate(), np.random.get_state(), own))  # noqa: NPY002 - the user's legacy state
