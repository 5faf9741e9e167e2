"""Stand-ins for outputs and targets, to try a loss on where their values are not known yet: while tracing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

DRAWS = 2
"""How many times a loss is tried: on outputs between 0 and 1, as probabilities are, and on some of either sign."""


def outputs(shape: Sequence[int], dtype: Any, draw: int) -> np.ndarray:
    """Random outputs of a shape and a floating-point dtype.

    >>> made = outputs((4, 3), "float32", 0)
    >>> bool(((0 < made) & (made < 1)).all()), made.dtype.name, float(abs(outputs((4, 3), "float32", 1)).max()) > 1
    (True, 'float32', True)
    """
    generator = np.random.default_rng((1, draw))
    made = generator.uniform(0.1, 0.9, shape) if draw == 0 else generator.normal(0, 3, shape)
    return made.astype(dtype)


def targets(shape: Sequence[int], dtype: Any, classes: int, draw: int) -> np.ndarray:
    """Random targets: labels below `classes` for integers, else numbers between 0 and 1.

    >>> bool(targets((5,), "int32", 2, 0).max() < 2), targets((5,), "bool", 2, 0).dtype.name
    (True, 'bool')
    """
    generator = np.random.default_rng((2, draw))
    if np.dtype(dtype).kind in "iu":
        return generator.integers(0, max(classes, 1), shape).astype(dtype)
    made = generator.uniform(0.1, 0.9, shape)
    return made > 0.5 if np.dtype(dtype).kind == "b" else made.astype(dtype)


def classes(shapes: Sequence[Sequence[int]]) -> int:
    """Classes that outputs of these shapes have at least: the smallest of their axes but that of the samples.

    >>> classes([(8, 16, 10)]), classes([(8,)])
    (10, 1)
    """
    return min((size for shape in shapes for size in shape[1:]), default=1)
