"""Whole parameters for processes that hold a shard each, in rounds, although each process goes its own way.

A collective operation needs all processes at once, and a measurement takes as many passes as its own samples ask for.
So each time that one needs a parameter, all tell a number: which parameter they need, that they have a gradient to add
up, that they are done, or have failed. The parameters that were named are gathered, each once, by all. Processes in
step with each other gather what all of them need; one that is done goes on serving the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from lnp_torch.collectives import with_others
from lnp_torch.dtensors import is_sharded, own_part, whole
from lnp_torch.meeting import Gone, ended

DONE, FAILED = -1, -2


class Over(BaseException):
    """There are no rounds any more; not an Exception, for a pass that fails is tried in another way."""


class Failed(Over):
    """Another process has failed: this one has nothing to tell it."""


class Broken(Over):
    """Another process is gone, as the cause says."""


class Rounds:
    """What processes gather and add up for each other.

    Parameters
    ----------
    tensors:
        The sharded parameters, DTensors of one mesh; plain tensors where each process holds all of it.
    process_group:
        Of the mesh.
    wait:
        Waits for a collective operation, and raises an error where a process is gone.

    Attributes
    ----------
    running:
        Whether the others count on this process to take part.
    """

    def __init__(self, tensors: Sequence[Any], process_group: Any, wait: Callable[[Any], None]) -> None:
        self._tensors, self._group, self._wait = tensors, process_group, wait
        self._size, self._device = dist.get_world_size(process_group), tensors[0].device
        self.running = False

    def gathered(self, index: int) -> torch.Tensor:
        """The whole of a parameter."""
        _, full = self._round(index)
        assert full is not None, "it was asked for in this round"
        return full

    def added_up(self, index: int, gradient: torch.Tensor) -> torch.Tensor:
        """This process's shard of the sum over processes of a parameter's gradient; the whole of one not sharded.

        Where other processes have gradients of other parameters, or none, these are added up first, with zeros of this
        one: a parameter that one process does not use has a gradient in others. So a sum may come in several parts.
        """
        first = len(self._tensors)
        while True:
            codes, _ = self._round(first + index)
            if any(0 <= code < first for code in codes):
                continue  # some are on their way
            chosen = min(code for code in codes if code >= first) - first
            total = self._summed(chosen, gradient if chosen == index else None)
            if chosen == index:
                return total
            self.others[chosen] = self.others.get(chosen, 0) + total

    def finish(self) -> None:
        """Serve the others until all are done."""
        first = len(self._tensors)
        while True:
            codes, _ = self._round(DONE)
            if all(code == DONE for code in codes):
                self.running = False
                return
            if not any(0 <= code < first for code in codes):
                chosen = min(code for code in codes if code >= first) - first
                self.others[chosen] = self.others.get(chosen, 0) + self._summed(chosen, None)

    def start(self) -> None:
        """From now on the others count on this process."""
        self.running, self.others = True, dict[int, torch.Tensor]()

    def fail(self) -> None:
        """Let the others know, in the round that they wait for, that this process takes part in none after it."""
        if self.running:
            self._codes(FAILED)
            self.running = False

    def _round(self, code: int) -> tuple[list[int], torch.Tensor | None]:
        """What all processes have named, gathered; the codes, and the parameter of this one's."""
        codes = self._codes(code)
        if FAILED in codes:
            self.running = False
            raise Failed("another process has failed")
        mine = None
        with torch.no_grad(), self._connected():
            for index in sorted({one for one in codes if 0 <= one < len(self._tensors)}):
                one = self._tensors[index]
                full = whole(one, self._wait) if is_sharded(one) else one.detach()
                mine = full if index == code else mine
        return codes, mine

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """Around collective operations."""
        if not self.running:
            raise Failed("there are no rounds any more")
        try:
            with with_others(), ended():
                yield
        except Gone as error:
            self.running = False
            raise Broken(str(error)) from error

    def _codes(self, code: int) -> list[int]:
        own = torch.tensor([code], device=self._device)
        every = [torch.empty_like(own) for _ in range(self._size)]
        with self._connected():
            self._wait(dist.all_gather(every, own, group=self._group, async_op=True))
        return torch.cat(every).tolist()

    def _summed(self, index: int, gradient: torch.Tensor | None) -> torch.Tensor:
        """A gradient added up over processes, of which this one keeps its shard."""
        like = self._tensors[index]
        total = torch.zeros(like.shape, dtype=torch.float32, device=self._device) if gradient is None else gradient
        total = total.to(torch.float64 if like.dtype == torch.float64 else torch.float32, copy=True).contiguous()
        with torch.no_grad(), self._connected():
            self._wait(dist.all_reduce(total, group=self._group, async_op=True))
        return own_part(total, like).clone() if is_sharded(like) else total
