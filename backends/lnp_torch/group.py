"""Which processes measure a model together, and how they add up their gradients."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lnp.contract.linearization import Linearization, Vector, unit
from lnp_torch.collectives import with_others
from lnp_torch.dtensors import is_sharded
from lnp_torch.meeting import Gone, Meeting, ended
from lnp_torch.met import met_one_by_one
from lnp_torch.model_parts import unwrapped
from lnp_torch.outputs import square_norm, widened
from lnp_torch.refusals import TOGETHER, is_tensor_parallel, process_group_of_shards, refusal
from lnp_torch.rounds import Broken, Failed, Rounds
from lnp_torch.sharded import Gathering, set_active

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
    """The processes of a group in one measurement, each with all parameters: a `lnp.results.in_group.Group`."""

    whole_gradients = True

    def __init__(self, process_group: Any, timeout: float) -> None:
        self._process_group = process_group
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.parts: tuple[int, ...] = tuple(range(self.size))
        name = getattr(process_group, "group_name", "") or "all"
        self._meeting = Meeting(name, dist.get_process_group_ranks(process_group), self.rank, timeout)

    @property
    def shares_a_part(self) -> bool:
        """Whether others have the same part of the batch."""
        return len(set(self.parts)) < self.size

    def session(self) -> AbstractContextManager:
        """Around a measurement: waits for all processes, and tells the others of an error."""
        return self._meeting.session()

    def exchange(self, point: str, value: Any) -> list[Any]:
        """The small values of all processes, by rank."""
        return self._meeting.exchange(point, value)

    def summed(self, lin: Linearization, vector: Vector | None, share: float) -> tuple[dict[str, Any], Vector | None]:
        """share * J^T g / m, added up over processes, one parameter after the other, as training does."""
        assert vector is not None, "every process holds its own"
        made = {}
        with with_others():
            for name in sorted(vector):  # in one order in all processes
                made[name] = (share * widened(vector[name])).contiguous()
                self._done(dist.all_reduce(made[name], group=self._process_group, async_op=True))
        squares = lin.inner_products(made, made)
        return {name: square if self.rank == 0 else 0.0 for name, square in squares.items()}, made

    def _done(self, work: Any, failures: bool = True) -> None:
        """Wait for a collective operation, unless a process that takes part in it is gone, or has failed: one that has
        failed in a round tells it in a round.
        """
        asked, pause = time.monotonic(), 0.0
        while not work.is_completed():
            if time.monotonic() - asked > 1:
                self._meeting.watch(failures)
                asked = time.monotonic()
            time.sleep(pause)
            pause = min(pause + 2e-5, 2e-3)  # at first as short as a small operation takes
        with ended():
            work.wait()


class ShardedProcesses(Processes):
    """The same for a model whose parameters are sharded over the processes.

    Attributes
    ----------
    gathering:
        What brings the parameters.
    summed_gradient:
        {parameter: this process's part of what `summed` has added up}.
    """

    whole_gradients = False

    def __init__(self, model: nn.Module, process_group: Any, timeout: float) -> None:
        super().__init__(process_group, timeout)
        self.parts = (0,) * self.size if is_tensor_parallel(model) else self.parts
        self.summed_gradient: dict[str, torch.Tensor] = {}
        self._names = dict(unwrapped(model).named_parameters())
        self._tensors = list(self._names.values())
        self._rounds = Rounds(self._tensors, process_group, partial(self._done, failures=False))
        self.gathering = Gathering(model, self._rounds, {id(p): index for index, p in enumerate(self._tensors)})

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Around a measurement, in which operations find the parameters that they read."""
        with self._meeting.session():
            self._rounds.start()
            set_active(self.gathering)
            try:
                with self.gathering:
                    yield
            except Failed as failed:
                self._meeting.watch()  # raises with the reason
                raise RuntimeError(str(failed)) from failed
            except Broken as broken:
                raise Gone(str(broken)) from broken
            except Gone:
                raise
            except BaseException as error:
                self._meeting.tell(error)  # the reason, before the others hear that there is one
                with contextlib.suppress(RuntimeError):  # the others have failed as well
                    self._rounds.fail()
                raise
            finally:
                set_active(None)
                self.gathering.let_go()

    def exchange(self, point: str, value: Any) -> list[Any]:
        """The small values of all processes, which are done with what they needed of each other."""
        if self._rounds.running:
            self._rounds.finish()
        return self._meeting.exchange(point, value)

    def summed(self, lin: Linearization, vector: Vector | None, share: float) -> tuple[dict[str, Any], Vector | None]:
        """share * J^T g / m, added up as its parameters come out of one more backward pass, of which each process keeps
        its shard for a moment.
        """
        index = {name: place for place, name in enumerate(self._names)}
        totals: dict[int, torch.Tensor | float] = {}
        self._rounds.start()

        def meet(name: str, gradient: torch.Tensor) -> None:
            totals[index[name]] = totals.get(index[name], 0.0) + self._rounds.added_up(index[name], gradient)

        g, _ = unit(lin.xp, lin.loss_gradient)
        with met_one_by_one(self.gathering.parameters, meet):
            lin.vjp(share * g)
        self._rounds.finish()
        squares: dict[str, Any] = {}
        for name in self.gathering.parameters:
            place = index[name]
            total = torch.as_tensor(totals.get(place, 0.0) + self._rounds.others.get(place, 0.0))
            squares[name] = square_norm(total) / _copies(self._tensors[place], self.size)
            if self.shares_a_part:
                self.summed_gradient[name] = total
        return squares, None


def _copies(tensor: Any, size: int) -> int:
    """How many processes hold the same part of a tensor."""
    if not is_sharded(tensor):
        return size
    kept = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(count for count, placement in kept if placement.is_replicate())


def group_of(model: Any, asked: Any) -> Processes | None:
    """The processes that measure a model together; None for this process alone.

    Parameters
    ----------
    asked:
        "auto" for those that the model tells of: the group of DistributedDataParallel, or of the mesh over which
        `fully_shard` has sharded it. None for this process alone; or a ProcessGroup, a one-dimensional DeviceMesh, or a
        `Group`.

    Raises
    ------
    TypeError, ValueError
        For another value, and for a group that this process is no part of, or over which the model is not sharded.
    """
    timeout = asked.timeout if isinstance(asked, Group) else TIMEOUT
    if asked is None or not (dist.is_available() and dist.is_initialized()):
        _refuse_without_group(asked)
        return None
    found = _process_group(model, asked)
    over = process_group_of_shards(model)
    if over is not None:
        if found is NOT_DISTRIBUTED or asked == Group(timeout=timeout):
            found = over
        if _ranks(found) != _ranks(over):
            raise ValueError(
                f"group= has the processes {_ranks(found)}, and the model is sharded over {_ranks(over)}. Expected the "
                "same processes. Leave group= out."
            )
        return ShardedProcesses(model, over, timeout)
    if found is NOT_DISTRIBUTED:
        return None
    if dist.get_rank(found) < 0:
        raise ValueError(NO_PART)
    return Processes(found, timeout) if dist.get_world_size(found) > 1 else None


def _ranks(process_group: Any) -> list[int]:
    return dist.get_process_group_ranks(process_group)


def needs_all(model: Any) -> bool:
    """Whether the model's parameters are sharded, so that all processes have to measure it."""
    return refusal(model) == TOGETHER


def process_number() -> int | None:
    """This process among those of `torch.distributed`; None where it is the only one."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.get_rank() if several else None


NOT_DISTRIBUTED = object()
NO_PART = (
    "This process is no part of the group that was given as group=. Expected a call in the group's processes. Call it "
    "in these alone, or pass a group that this process is part of."
)
KINDS = "torch.distributed.ProcessGroup, a DeviceMesh of one dimension, lnp_torch.Group(...), None or 'auto'"


def _process_group(model: Any, asked: Any) -> Any:
    """The process group that was asked for; None is that of all processes."""
    if isinstance(asked, Group):
        return asked.process_group
    if isinstance(asked, dist.ProcessGroup):
        return asked
    if asked is dist.GroupMember.NON_GROUP_MEMBER:  # what new_group gives a process that it leaves out
        raise ValueError(NO_PART)
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
