"""Tensors of which each process of a mesh holds a part: the whole of one, and a process's part of a whole.

DTensor's own `full_tensor` and `redistribute` give the same. On gloo each names its operation to PyTorch by more than
fifteen characters, and gloo's two threads write the name of the last operation that ended into one string, without a
lock: longer ones are on the heap, which is damaged where another operation ends at the same time (seen with PyTorch
2.13). lnp calls thousands of small operations one right after the other; those used here have short names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

Wait = Callable[[Any], None]
"""Waits for a collective operation, and raises an error where a process is gone."""


def is_sharded(tensor: Any) -> bool:
    """Whether it is spread over the processes of a mesh."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Any, wait: Wait) -> torch.Tensor:
    """All of a DTensor, which all processes of its mesh ask for."""
    local, along = tensor.detach().to_local(), _along(tensor)
    if along is None or not tensor.numel():
        return local
    axis, dim = along
    size, rows = tensor.device_mesh.size(axis), local.movedim(dim, 0)
    most = -(-tensor.shape[dim] // size)  # the last processes have fewer, or none
    own = rows.new_zeros(most, *rows.shape[1:])
    own[: len(rows)] = rows
    every = rows.new_empty(size * most, *rows.shape[1:])
    wait(dist.all_gather(list(every.chunk(size)), own, group=tensor.device_mesh.get_group(axis), async_op=True))
    return every[: tensor.shape[dim]].movedim(0, dim)


def own_part(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    """What this process holds of a tensor that is spread as a DTensor of the same shape is."""
    along = _along(like)
    if along is None:
        return tensor
    axis, dim = along
    most = -(-like.shape[dim] // like.device_mesh.size(axis))
    first = min(most * like.device_mesh.get_local_rank(axis), like.shape[dim])
    return tensor.narrow(dim, first, min(most, like.shape[dim] - first))


def _along(tensor: Any) -> tuple[int, int] | None:
    """(dimension of the mesh, dimension of the tensor) along which it is cut; None where each process has all of it."""
    cut = [(axis, placement.dim) for axis, placement in enumerate(tensor.placements) if placement.is_shard()]
    if len(cut) > 1:
        raise ValueError(f"A DTensor of placements {tensor.placements} is cut along {len(cut)} dimensions, not one.")
    return cut[0] if cut else None
