"""Parameters at which nobody trains, to compare samples there too; some of their entries in memory at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from array_api_compat import torch as xp

from lnp.per_sample import differences, self_check
from lnp.per_sample.norms import room
from lnp_torch.outputs import square_norm, widened


def moved_parameter(number: int, p: torch.Tensor) -> torch.Tensor:
    """As `lnp.per_sample.self_check.moved_parameter`, whose steps would each take an array of the parameter's size."""
    mean_square = square_norm(p) / p.numel()

    def change(entries: torch.Tensor, start: int) -> torch.Tensor:
        return self_check.moved_entries(xp, entries, mean_square.to(entries.dtype), number, start)

    return _entry_by_entry(p, change)


def rounded_parameter(number: int, p: torch.Tensor) -> torch.Tensor:
    """A parameter whose entries are off by their last digit."""
    eps = torch.finfo(p.dtype).eps
    return _entry_by_entry(p, lambda x, start: x * (1 + eps * differences.irregular(xp, len(x), number, x, start)))


def _entry_by_entry(p: torch.Tensor, change: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
    """A tensor whose entries are changed: (some of them (n,), the number of the first one) -> (n,)."""
    made = torch.empty(p.shape, dtype=p.dtype, device=p.device)
    flat, old, size = made.view(-1), p.reshape(-1), room(p, differences.PIECE)
    for start in range(0, len(flat), size):
        flat[start : start + size] = change(widened(old[start : start + size]), start)
    return made if p.is_contiguous() else torch.empty_like(p).copy_(made)
