"""Vectors in parameter space that the user passes: an update, or the diagonal of a preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

NAMED = 4
"""Parameters that an error names."""


def update_by_name(
    update: Any, shapes: Mapping[str, tuple[int, ...]], in_order: Callable[[Any], Sequence[Any]], expected: str
) -> dict[str, Any]:
    """{parameter name: the user's array} of those parameters that the update has.

    Parameters
    ----------
    update:
        {parameter name: array of its shape}, or a container with one array for each parameter.
    shapes:
        {parameter name: shape} of all, in their order.
    in_order:
        Container -> its arrays, in the parameters' order.
    expected:
        What the error says was expected.

    Raises
    ------
    ValueError
        For other names, numbers or shapes.

    >>> update_by_name({"b": [1.0]}, {"a": (2,), "b": (1,)}, list, "a dictionary")
    {'b': [1.0]}
    """
    if isinstance(update, Mapping) and update and set(update) <= set(shapes):
        given = dict(update)
    else:
        try:
            values = in_order(update)
        except TypeError:  # nothing to go through
            values = ()
        given = dict(zip(shapes, values, strict=True)) if len(values) == len(shapes) else {}
    wrong = [name for name, part in given.items() if _shape(part) != tuple(shapes[name])]
    if wrong or not given:
        where = f" at {wrong[:NAMED]}" if wrong else ""
        raise ValueError(
            f"The update, or the preconditioner, of type {type(update).__name__} does not match the model's "
            f"parameters{where}. Expected {expected}."
        )
    return given


def _shape(part: Any) -> tuple[int, ...]:
    return tuple(part.shape) if hasattr(part, "shape") else np.shape(part)
