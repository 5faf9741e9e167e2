"""The sequence of operations of a forward pass: what identifies it, and where rows move as chance or values decide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lnp_torch.writes import tensors

REROUTING = frozenset(
    {"randperm", "randint", "multinomial", "nonzero", "argwhere", "masked_select", "argsort", "bincount", "unique"}
)
"""Operations by which rows move as chance or values decide: in one batch a rule may read them right, in another not."""
SMALL = 16
"""Integers up to which each is a setting of its own (an axis, a shift)."""


class Sequence:
    """Follows the operations of a pass.

    Attributes
    ----------
    identity:
        Of their names and settings, and of what else was added.
    rerouting:
        Whether rows have moved up to now.
    """

    def __init__(self) -> None:
        self.identity, self.rerouting = 0, False
        self._moved: int | None = None

    def add(self, *what: Any) -> None:
        """Something more that identifies it."""
        self.identity = hash((self.identity, *what))

    def follow(self, name: str, args: tuple, kwargs: dict, out: Any, constant: bool) -> None:
        """An operation was called; `constant` if nothing that went in comes from the batch."""
        if name != "__get__":
            self.add(name, *_settings(args), *_settings(kwargs.values()))
        if not constant and (name in REROUTING or (name == "__getitem__" and _masked(args))):
            self.rerouting = True
        if self.rerouting and self._moved is None and isinstance(out, Tensor) and out.grad_fn is not None:
            self._moved = out.grad_fn._sequence_nr()

    def reroutes(self, outputs: list[Tensor]) -> bool:
        """Whether rows have moved on the way to these outputs, not in what was computed from them later."""
        made = max((out.grad_fn._sequence_nr() for out in outputs if out.grad_fn is not None), default=0)
        return self.rerouting and (self._moved is None or self._moved <= made)


def _masked(args: tuple) -> bool:
    return any(tensor.dtype == torch.bool for tensor in tensors(args[1:]))


def _settings(values: Iterable[Any]) -> Iterator[Any]:
    """The words and small integers among an operation's arguments: an axis, a shift, a mode."""
    for value in values:
        if type(value) in (tuple, list):
            yield from _settings(value)
        elif isinstance(value, bool | str | None) or (isinstance(value, int) and abs(value) <= SMALL):
            yield value
