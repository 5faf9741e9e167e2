"""Where a tracker's own batches come from: one batch for all measurements, or a loader that begins anew at its end."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np

from lnp.contract import registry


def source(given: Any) -> Fixed | Cycle:
    """A source of batches from a batch, or from something to iterate over."""
    return Fixed(given) if is_batch(given) else Cycle(given)


def is_batch(value: Any) -> bool:
    """Whether it is one batch, (inputs, targets) or a dictionary, and not a collection of batches.

    A list is a batch too, for loaders collate into lists, unless each of its items is one.

    >>> is_batch(("inputs", "targets")), is_batch([("inputs", "targets"), ("inputs", "targets")])
    (True, False)
    """
    if isinstance(value, list):
        return not (value and all(isinstance(item, tuple | list | Mapping) for item in value))
    return isinstance(value, tuple | Mapping)


class Fixed:
    """One batch, for all measurements."""

    position = 0

    def __init__(self, batch: Any) -> None:
        self.last = batch

    def next(self, model: Any) -> Any:
        """The batch."""
        return self.last

    def seek(self, position: int) -> None:
        """Nothing to do: it is always the same."""


class Cycle:
    """Batches from something that can be iterated over again and again; the caller's random state is not used up."""

    def __init__(self, batches: Iterable[Any]) -> None:
        if not isinstance(batches, Iterable):
            raise TypeError(
                f"batch= is of type {type(batches).__name__}. Expected a batch, (inputs, targets) or a dictionary, or "
                "something to iterate over, such as a loader."
            )
        self._batches = batches
        self._iterator: Iterator | None = None
        self.last: Any = None
        self.position, self._behind = 0, 0

    def next(self, model: Any) -> Any:
        """The next batch, from the beginning again after the last one."""
        with _untouched(model):
            while self._behind:
                self._behind -= 1  # one that fails is passed over, too
                self._following()
            self.last = self._following()
        self.position += 1
        return self.last

    def seek(self, position: int) -> None:
        """Have the batch after so many be the next."""
        length = len(self._batches) if isinstance(self._batches, Sized) else 0
        self._behind = position % length if length else position
        self._iterator, self.position = None, position

    def _following(self) -> Any:
        for _ in range(2):
            if self._iterator is None:
                self._iterator = iter(self._batches)
            for batch in self._iterator:
                return batch
            self._iterator = None  # at the end: from the beginning
        raise ValueError(
            f"batch= (of type {type(self._batches).__name__}) has no more batches after {self.position}, also from the "
            "beginning. Expected something that can be iterated over again: pass a list of batches or a loader, not a "
            "generator."
        )


@contextlib.contextmanager
def _untouched(model: Any) -> Iterator[None]:
    """Python's, NumPy's and the model's framework's random states are the same afterwards: loaders draw from them."""
    keep = (
        contextlib.nullcontext if model is None else getattr(registry.find(model), "untouched", contextlib.nullcontext)
    )
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's legacy state
    try:
        with keep():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
