"""Where a tracker's own batches come from: one batch for all measurements, or a loader that begins anew at its end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

from lnp.arguments import Batch, Model
from lnp.state.random_states import random_states_kept


def batch_source(batches: Batch | Iterable[Batch]) -> FixedBatch | CyclingBatches:
    """A source of batches from a batch, or from something to iterate over."""
    return FixedBatch(batches) if is_batch(batches) else CyclingBatches(batches)


def is_batch(value: Any) -> bool:
    """Whether it is one batch, (inputs, targets) or a dictionary, and not a collection of batches.

    A list is a batch too, for loaders collate into lists, unless each of its items is one.

    >>> is_batch(("inputs", "targets")), is_batch([("inputs", "targets"), ("inputs", "targets")])
    (True, False)
    """
    if isinstance(value, list):
        return not (value and all(isinstance(item, tuple | list | Mapping) for item in value))
    return isinstance(value, tuple | Mapping)


class FixedBatch:
    """One batch, for all measurements."""

    position = 0

    key = 0
    """Which batch the last one was, equal for batches of the same samples; None where none comes again."""

    def __init__(self, batch: Batch) -> None:
        self.last = batch

    def next(self, model: Model) -> Batch:
        """The batch."""
        return self.last

    def seek(self, position: int) -> None:
        """Nothing to do: the batch is always the same."""


class CyclingBatches:
    """Batches from something that can be iterated over again and again; the caller's random state is not used up."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        if not isinstance(batches, Iterable):
            raise TypeError(
                f"batch= is of type {type(batches).__name__}. Expected a batch, (inputs, targets) or a dictionary, or "
                "something to iterate over, such as a loader."
            )
        self._batches = batches
        self._iterator: Iterator | None = None
        self.last: Batch = None
        self.position = 0
        self._skipped = 0  # batches to pass over before the next one

    def next(self, model: Model) -> Batch:
        """The next batch, from the beginning again after the last one."""
        with random_states_kept(model):
            while self._skipped:
                self._skipped -= 1  # before the batch is loaded: one that fails is passed over, too
                self._load()
            self.last = self._load()
        self.position += 1
        return self.last

    @property
    def key(self) -> int | None:
        """Which batch the last one was; None where they are made anew, as loaders do, and none comes again."""
        return (self.position - 1) % len(self._batches) if isinstance(self._batches, Sequence) else None

    def seek(self, position: int) -> None:
        """Make the batch at this position the next one."""
        length = len(self._batches) if isinstance(self._batches, Sized) else 0
        self._skipped = position % length if length else position
        self._iterator = None
        self.position = position

    def _load(self) -> Batch:
        """The batch that comes next in the iteration, which begins anew at its end."""
        for _ in range(2):
            if self._iterator is None:
                self._iterator = iter(self._batches)
            for batch in self._iterator:
                return batch
            self._iterator = None
        raise ValueError(
            f"batch= (of type {type(self._batches).__name__}) has no more batches after {self.position}, also from the "
            "beginning. Expected something that can be iterated over again: pass a list of batches or a loader, not a "
            "generator."
        )
