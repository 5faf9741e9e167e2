"""The batches whose gradients one update of a Hugging Face Trainer adds up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class HandedOut:
    """A trainer's `get_batch_samples`, which remembers the batches of the update that begins.

    Attributes
    ----------
    original:
        The function itself.
    before:
        What the trainer, and not its class, had under this name; None without.
    last:
        The batches.
    """

    original: Callable
    before: Callable | None
    last: Sequence[Any] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self.original(*args, **kwargs)
        self.last = tuple(found[0])
        return found

    def beginning_with(self, inputs: Any) -> list[Any]:
        """All batches of the update, of which these inputs are the first.

        Raises
        ------
        ValueError
            If they are not.
        """
        if not (self.last and self.last[0] is inputs):
            raise ValueError(
                "The trainer has not taken this update's batches from its get_batch_samples. Expected one that does. "
                "Attach without accumulated=True, to measure the first of them."
            )
        return list(self.last)
