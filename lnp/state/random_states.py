"""Random states of the process, kept while a loader is read: loaders draw from them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np

from lnp.arguments import Model
from lnp.contract import registry


@contextlib.contextmanager
def random_states_kept(model: Model) -> Iterator[None]:
    """Python's, NumPy's and the model's framework's random states are the same afterwards."""
    backend = None if model is None else registry.find(model)
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - the user's legacy state
    try:
        with getattr(backend, "untouched", contextlib.nullcontext)():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
