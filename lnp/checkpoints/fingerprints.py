"""What tells, when measuring goes on, whether batches and options are those of before."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np

from lnp.contract.trees import children


def digest(tree: Any) -> str:
    """Some digits that are the same for batches of the same numbers in the same structure, in any framework.

    >>> digest([np.eye(2), "a"]) == digest([np.eye(2), "a"]), digest([np.eye(2)]) == digest([-np.eye(2)])
    (True, False)
    """
    found = hashlib.sha256()
    _add(found, tree)
    return found.hexdigest()[:16]


def text_of(value: Any) -> str:
    """An option as text that is the same in another process: a function by its name, arrays by their digits."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, str | int | float | bool | None | tuple | list):
        return repr(value)
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{type(value).__module__}.{type(value).__qualname__} {digest(value)}"


def _add(found: Any, tree: Any) -> None:
    """Add a tree to a digest."""
    inner = children(tree)
    if inner is not None:
        for name, child in inner.items():
            found.update(f"{name}:".encode())
            _add(found, child)
        return
    if hasattr(tree, "shape") and hasattr(tree, "dtype"):
        array = as_numpy(tree)
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    elif isinstance(tree, str | int | float | complex | bool | None):
        found.update(repr(tree).encode())
    else:
        found.update(f"{type(tree).__module__}.{type(tree).__qualname__}".encode())


def as_numpy(array: Any) -> np.ndarray:
    """An array of any framework in NumPy; types that NumPy does not have become Python's numbers first."""
    try:
        return np.asarray(array)
    except (TypeError, RuntimeError):  # on a device, or in bfloat16
        return np.asarray(array.tolist())
