"""Each process measures by itself: a network or loss that talks to others would wait for them for ever.

Synchronised batch normalisation does that, losses that gather the outputs of all processes, and layers that are spread
over several. While one process measures alone, its collective operations raise an error instead.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from lnp_torch.as_written import Counted

TALKS = (
    "The network or its loss talks to other processes ({}), and lnp runs it in each by itself: it would wait for them "
    "for ever. Expected a forward pass and a loss that need this process alone. Measure a copy without collective "
    "operations, such as one with nn.BatchNorm2d in the place of nn.SyncBatchNorm."
)
NAMES = (
    *("allreduce", "allreduce_coalesced", "allgather", "_allgather_base", "allgather_coalesced"),
    *("allgather_into_tensor_coalesced", "broadcast", "reduce", "reduce_scatter", "_reduce_scatter_base"),
    *("reduce_scatter_tensor_coalesced", "gather", "scatter", "alltoall", "alltoall_base", "all_gather_single"),
    *("all_to_all_single", "reduce_scatter_single", "barrier", "monitored_barrier", "send", "recv", "recv_anysource"),
)
"""Methods of `torch.distributed.ProcessGroup` by which processes talk; not every release has all of them."""


class _Alone(threading.local):
    on = False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Collective operations of this thread raise RuntimeError, if this process is one of several."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield
        return
    with _REFUSED, _switched(True):
        yield


def with_others() -> contextlib.AbstractContextManager:
    """Inside of `alone`, for what is the training step's own."""
    return _switched(False)


@contextlib.contextmanager
def _switched(on: bool) -> Iterator[None]:
    """Whether collective operations of this thread raise an error."""
    before, _ALONE.on = _ALONE.on, on
    try:
        yield
    finally:
        _ALONE.on = before


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """All methods by which processes talk, replaced by ones that look at the thread first."""
    group: Any = dist.ProcessGroup
    saved = {name: vars(group)[name] for name in NAMES if name in vars(group)}  # not bound: what is put back binds
    try:
        for name in saved:
            setattr(group, name, _either(name, getattr(group, name)))
        yield
    finally:
        for name, original in saved.items():
            setattr(group, name, original)


def _either(name: str, original: Callable) -> Callable:
    """A method that raises an error in a thread that measures alone, and is the original in all others."""

    def talk(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _ALONE.on:
            raise RuntimeError(TALKS.format(name))
        return original(self, *args, **kwargs)

    return talk


_ALONE = _Alone()
_REFUSED = Counted(_refused)
