"""Leave no trace: what running the user's Python code might disturb is put back, also when an exception passes."""

from __future__ import annotations

import contextlib
import random
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np


@contextlib.contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Modules' attributes and Python's and NumPy's random states are afterwards as they were before.

    TensorFlow's own random state needs no care: tracing draws nothing, and random operations in a graph have a state
    of their own. Generators are variables.
    """
    module = model() if isinstance(model, weakref.ref) else None
    parts = [] if module is None else [module, *getattr(module, "submodules", ())]
    attributes = [(part, dict(vars(part))) for part in parts]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's legacy state
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for part, saved in attributes:
            vars(part).clear()
            vars(part).update(saved)
