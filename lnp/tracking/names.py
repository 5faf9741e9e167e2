"""Steps and names of a row's columns: those that are measured, which no tag and no value of the caller's may take."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from lnp.results.display import SHAPE, WHOLE

STEP = "step"
RESUMED = "resumed"
"""The step from which on a record replaces earlier ones: a run that goes back writes it into its first record."""
NOTES = "notes"
SEAL = "crc32"
NUMBERS = frozenset((*WHOLE, "time", "seconds", "window"))
"""Columns that hold numbers, as do those whose names begin with one of the following."""
FAMILIES = ("population/", "layer/", "cross/", "measured/", "update/", "total/", "net/", "nested/")
TEXTS = ("measured/estimator", "measured/loss_name")
"""Columns of these families that hold texts."""
RESERVED = NUMBERS | {*SHAPE, STEP, RESUMED, NOTES, SEAL}


def holds_numbers(name: str) -> bool:
    """Whether a column holds numbers that were measured."""
    return name in NUMBERS or (name.startswith(FAMILIES) and name not in TEXTS)


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError for the names of measured columns among those of tags or values.

    >>> check_names(["width", "learning_rate"])
    """
    taken = sorted(name for name in names if name in RESERVED or name.startswith(FAMILIES))
    if taken:
        raise ValueError(
            f"Tags or values are named {', '.join(map(repr, taken))}. Expected names that no measured column has, "
            f"which would be lost. Choose others, such as {'my_' + taken[0].replace('/', '_')!r}."
        )


def check_step(step: Any) -> None:
    """Raise TypeError unless a step is an integer."""
    try:
        operator.index(step)
    except TypeError:
        raise TypeError(
            f"The step is of type {type(step).__name__}. Expected an integer, how many updates were made so far. The "
            "order is observe(step, model, batch)."
        ) from None
