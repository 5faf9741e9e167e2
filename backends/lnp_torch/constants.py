"""Tensors that a pass computes without its batch: from parameters, buffers and constants alone."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Protocol

from torch import Tensor


class Beginning(Protocol):
    """What a pass begins with, and whether it has begun."""

    given: set[int]
    begun: bool


class Constants:
    """Follows the operations of a pass. What comes from an operation that no mode sees is taken for the batch's.

    Parameters
    ----------
    beginning:
        Knows what the pass begins with: its `given` are the ids of parameters and buffers.
    """

    def __init__(self, beginning: Beginning) -> None:
        self._beginning, self._made, self._written = beginning, dict[int, weakref.ref](), set[int]()

    @property
    def begun(self) -> bool:
        """Whether operations are those of the pass."""
        return self._beginning.begun

    def __contains__(self, tensor: Tensor) -> bool:
        made = self._made.get(id(tensor))
        if made is not None and made() is tensor:
            return True
        return id(tensor) in self._beginning.given and id(tensor) not in self._written

    def made_here(self, tensor: Tensor) -> bool:
        """Whether it is one that the pass has made, not one that it begins with."""
        return tensor in self and id(tensor) not in self._beginning.given

    def follow(self, given: Iterable[Tensor], made: Iterable[Tensor]) -> bool:
        """An operation was called: what it made is one of these if all tensors that went in are. Whether they are."""
        constant = all(map(self.__contains__, given))
        for tensor in made:
            if constant:
                self._made[id(tensor)] = weakref.ref(tensor)
            elif tensor in self:  # the batch was written to it
                self._made.pop(id(tensor), None)
                self._written.add(id(tensor))
        return constant
