"""Which processes measure a model together, and how they add up their gradients."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lnp.contract.linearization import Vector
from lnp_torch.collectives import with_others
from lnp_torch.meeting import Meeting

TIMEOUT = 60.0
"""Seconds without a sign of life after which a process is taken to be gone."""


@dataclass(frozen=True)
class Group:
    """The processes that measure together, for `lnp.decompose(..., group=...)`.

    Parameters
    ----------
    process_group:
        A `torch.distributed.ProcessGroup`, or None for all processes.
    timeout:
        Seconds that a process waits for one of the others that gives no sign of life: that has not called, or is gone.

    Raises
    ------
    ValueError
        For a time limit that is not above zero.

    Examples
    --------
    >>> Group(timeout=300.0)
    Group(process_group=None, timeout=300.0)
    """

    process_group: Any = None
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout!r}. Expected seconds > 0, such as {TIMEOUT:g}.")


class Processes:
    """The processes of a group in one measurement: a `lnp.results.in_group.Group`."""

    def __init__(self, process_group: Any, timeout: float) -> None:
        self._process_group = process_group
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        name = getattr(process_group, "group_name", "") or "all"
        self._meeting = Meeting(name, dist.get_process_group_ranks(process_group), self.rank, timeout)

    def session(self) -> AbstractContextManager:
        """Around a measurement: waits for all processes, and tells the others of an error."""
        return self._meeting.session()

    def exchange(self, point: str, value: Any) -> list[Any]:
        """The small values of all processes, by rank."""
        return self._meeting.exchange(point, value)

    def summed(self, vector: Vector) -> dict[str, torch.Tensor]:
        """The sum over processes, one parameter after the other, as training does."""
        made = {}
        with with_others():
            for name, part in vector.items():
                made[name] = part.contiguous()
                self._done(dist.all_reduce(made[name], group=self._process_group, async_op=True))
        return made

    def _done(self, work: Any) -> None:
        """Wait for a collective operation, unless a process that takes part in it is gone."""
        asked = time.monotonic()
        while not work.is_completed():
            if time.monotonic() - asked > 1:
                self._meeting.watch()
                asked = time.monotonic()
            time.sleep(0)
        work.wait()


def group_of(model: Any, asked: Any) -> Processes | None:
    """The processes that measure a model together; None for this process alone.

    Parameters
    ----------
    asked:
        "auto" for those that the model tells of: the group of DistributedDataParallel. None for this process alone; or
        a ProcessGroup, a one-dimensional DeviceMesh, or a `Group`.

    Raises
    ------
    TypeError, ValueError
        For another value, and for a group that this process is no part of.
    """
    timeout = asked.timeout if isinstance(asked, Group) else TIMEOUT
    if asked is None or not (dist.is_available() and dist.is_initialized()):
        _refuse_without_group(asked)
        return None
    found = _process_group(model, asked)
    if found is NOT_DISTRIBUTED:
        return None
    if dist.get_rank(found) < 0:
        raise ValueError(
            "This process is no part of the group that was given as group=. Expected a call in the group's processes. "
            "Call it in these alone, or pass a group that this process is part of."
        )
    return Processes(found, timeout) if dist.get_world_size(found) > 1 else None


NOT_DISTRIBUTED = object()
KINDS = "torch.distributed.ProcessGroup, a DeviceMesh of one dimension, lnp_torch.Group(...), None or 'auto'"


def _process_group(model: Any, asked: Any) -> Any:
    """The process group that was asked for; None is that of all processes."""
    if isinstance(asked, Group):
        return asked.process_group
    if isinstance(asked, dist.ProcessGroup):
        return asked
    if isinstance(asked, dist.DeviceMesh) and asked.ndim == 1:
        return asked.get_group()
    if asked != "auto":
        raise TypeError(f"group is {asked!r}. Expected a {KINDS}.")
    modules = model.modules() if isinstance(model, nn.Module) else ()
    parallel = [module for module in modules if isinstance(module, nn.parallel.DistributedDataParallel)]
    return parallel[0].process_group if parallel else NOT_DISTRIBUTED


def _refuse_without_group(asked: Any) -> None:
    """Raise an error for a group that was asked for where PyTorch has none."""
    if asked is None or asked == "auto":
        return
    if not isinstance(asked, Group):
        raise TypeError(f"group is {asked!r}. Expected a {KINDS}.")
    raise ValueError(
        "group= was given, and torch.distributed is not initialised. Expected processes that know each other. Call "
        "torch.distributed.init_process_group(...) first, or leave group= out."
    )
