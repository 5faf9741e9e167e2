"""Tensors that a pass computes without its batch: from parameters, buffers and constants alone."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from lnp_torch.replica import Replica
from lnp_torch.writes import tensors


class Constants:
    """Follows the operations of a pass. What comes from an operation that no mode sees is taken for the batch's.

    Parameters
    ----------
    replica:
        Knows what the pass begins with.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica, self._made, self._written = replica, dict[int, weakref.ref](), set[int]()

    def __contains__(self, tensor: Tensor) -> bool:
        made = self._made.get(id(tensor))
        if made is not None and made() is tensor:
            return True
        return id(tensor) in self._replica.given and id(tensor) not in self._written

    def follow(self, args: tuple, kwargs: dict, out: Any) -> None:
        """An operation was called: its output is one of these if all tensors that went in are."""
        constant = all(tensor in self for tensor in tensors((args, kwargs)))
        for tensor in tensors(out):
            if constant:
                self._made[id(tensor)] = weakref.ref(tensor)
            elif tensor in self:  # the batch was written to it
                self._made.pop(id(tensor), None)
                self._written.add(id(tensor))
