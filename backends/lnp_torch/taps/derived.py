"""What a pass computes from parameters alone before it meets the samples: 1 + w, a scaled or joined weight, a table of
relative positions.

The operations in which it meets them have rules, which say what gradient each sample gives it. Autograd takes these
gradients back to the parameters, all samples at once, along the graph of what was computed.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from array_api_compat import torch as xp
from torch import Tensor

from lnp.per_sample import uses
from lnp.per_sample.uses import Factors

Frame = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Which numbers of a tensor's memory: (first, shape, strides)."""
BUDGET = 2**24
"""Numbers of single samples' gradients that are in memory at a time."""


@dataclass(frozen=True)
class Derived:
    """A tensor that was computed from parameters alone.

    Attributes
    ----------
    tensor:
        With its graph.
    sources:
        {name: what it was computed from}: parameters, and tables that were looked up in them.
    """

    tensor: Tensor
    sources: Mapping[str, Tensor]


@dataclass(frozen=True)
class Lookup:
    """Rows of an embedding that were looked up once for all samples; what was looked up is watched as a table of its
    own.

    Attributes
    ----------
    name, frame:
        The embedding's.
    rows:
        Which.
    shared:
        Whether all samples share them, as far as can be seen.
    """

    name: str
    frame: Frame
    rows: Tensor
    shared: bool = False

    def of(self, gradient: Tensor) -> Factors:
        """The use of the embedding, from the gradients (N, ...) of what was looked up."""
        values = gradient.reshape(len(gradient), self.rows.numel(), -1)
        rows, size = self.rows.reshape(-1), self.frame[1][0]
        if rows.numel() < size:
            return Factors("rows", (rows.expand(len(gradient), -1), values))
        kept = torch.where((rows >= 0)[:, None], values, torch.zeros_like(values))
        room = torch.zeros(len(gradient), size, values.shape[2], dtype=values.dtype, device=values.device)
        return Factors("dense", (room.index_add_(1, rows.clamp(min=0), kept),))


def square_norms(
    samples: int,
    derived: Mapping[str, Derived],
    kept: Mapping[str, Sequence[tuple[Frame, Factors]]],
    wanted: Mapping[str, Tensor],
    use: Callable[[str, Tensor], Factors],
) -> dict[str, Tensor]:
    """{source: (N,) squared norms}, of as many samples at a time as the budget holds; see `totals`.

    `use` says what a source's gradients (C, *shape) are a use of: itself, or what it was looked up in.
    """
    size = sum(one.tensor.numel() for one in derived.values()) + sum(tensor.numel() for tensor in wanted.values())
    chunk, found = max(1, BUDGET // max(1, size)), dict[str, list[Tensor]]()
    for start in range(0, samples, chunk):
        rows = slice(start, min(start + chunk, samples))
        for name, gradient in totals(rows, rows.stop - start, derived, kept, wanted).items():
            found.setdefault(name, []).append(uses.square_norms(xp, [use(name, gradient)]))
    return {name: torch.cat(parts) for name, parts in found.items()}


def totals(
    rows: Tensor | slice,
    samples: int,
    derived: Mapping[str, Derived],
    kept: Mapping[str, Sequence[tuple[Frame, Factors]]],
    wanted: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """{source: (C, *shape)} gradients of some samples, by its own uses and by those of what was computed from it.

    Parameters
    ----------
    rows, samples:
        Which samples, and how many they are.
    kept:
        {name of a source, or of what was derived: its uses}.
    wanted:
        The sources.
    """
    found = {name: _gradients(rows, samples, tensor, kept.get(name, ())) for name, tensor in wanted.items()}
    made = {own: one for own, one in derived.items() if own in kept and one.sources.keys() & wanted.keys()}
    if not made:
        return found
    gradients = [_gradients(rows, samples, one.tensor, kept[own]).to(one.tensor.dtype) for own, one in made.items()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")  # a loop, where it has to be one
        pulled = torch.autograd.grad(  # all at once: each call takes as long as a small network's layer
            [one.tensor for one in made.values()], list(wanted.values()), gradients,
            retain_graph=True, allow_unused=True, is_grads_batched=True,
        )  # fmt: skip
    for name, part in zip(wanted, pulled, strict=True):
        if part is not None:
            found[name] = found[name] + part
    return found


def _gradients(rows: Tensor | slice, samples: int, whole: Tensor, kept: Sequence[tuple[Frame, Factors]]) -> Tensor:
    """(C, *shape) of a tensor by uses of it, or of views of it."""
    strides, shape = whole.stride(), whole.shape
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    room = torch.zeros(samples, extent, device=whole.device, dtype=torch.promote_types(whole.dtype, torch.float32))
    for (start, part, steps), factors in kept:
        gradients = uses.gradients(xp, factors.of(rows), part)
        room.as_strided((samples, *part), (extent, *steps), start).add_(gradients)
    return room.as_strided((samples, *shape), (extent, *strides))


def disjoint(frames: list[Hashable]) -> bool:
    """Whether the frames fill intervals of the parameter's memory that do not overlap."""
    intervals = []
    for frame in frames:
        start, shape, strides = cast(Frame, frame)
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        intervals.append((start, start + extent))
    intervals.sort()
    return all(end <= start for (_, end), (start, _) in itertools.pairwise(intervals))
