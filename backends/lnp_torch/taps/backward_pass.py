"""Samples after their forward pass, and what a backward pass yields of each of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from lnp_torch import fallback
from lnp_torch.fallback import dense
from lnp_torch.float16 import scale_to_one
from lnp_torch.met import Meet, met_one_by_one
from lnp_torch.outputs import flatten, split, widened
from lnp_torch.plans import Plan
from lnp_torch.replay import Passes
from lnp_torch.taps.function_mode import Taps
from lnp_torch.taps.reader import Pullback, Reading


@dataclass(frozen=True)
class Tapped:
    """Some samples after their forward pass.

    Attributes
    ----------
    rows:
        Which samples of the batch.
    parts:
        Outputs, with the graph that leads to them.
    taps:
        On the operations in between.
    """

    rows: slice
    parts: list[torch.Tensor]
    taps: Taps


Watcher = Callable[[slice, torch.Tensor], None]
"""(which samples, their outputs (C, K)): called with what ran apart from the batch."""


@dataclass(frozen=True)
class Samples:
    """The samples of a batch, or some of them.

    Attributes
    ----------
    passes:
        Of these samples.
    visit:
        The samples after their forward pass, whole or in micro-batches one after the other.
    outputs:
        (N, K), those of the batch's own function.
    apart:
        Whether their forward pass is another one than that of the batch.
    let_go:
        Lets go of the graph of a forward pass, which the next visit makes anew, where it is theirs alone.
    """

    passes: Passes
    visit: Callable[[], Iterable[Tapped]]
    outputs: torch.Tensor
    apart: bool = True
    let_go: Callable[[], object] = lambda: None

    def pulled(
        self, v: torch.Tensor, plan: Plan, reading: Reading, names: Collection[str] = (), watch: Watcher | None = None
    ) -> Pullback:
        """What a backward pass yields, with the squared norms of all parameters."""
        found = self.tapped(v, reading, names, watch)
        missing = [name for name in self.passes.program.parameters if name not in found.square_norms]
        if not missing:
            return found
        alone = fallback.alone(plan.way.pull(self.passes.restricted(missing)), v, with_sum=False)
        if watch is not None:
            watch(slice(0, len(v)), alone.outputs)
        every = {**found.square_norms, **alone.square_norms}
        return replace(found, square_norms={name: every[name] for name in self.passes.program.parameters})

    def tapped(
        self,
        v: torch.Tensor,
        reading: Reading,
        names: Collection[str] = (),
        watch: Watcher | None = None,
        meet: Meet | None = None,
    ) -> Pullback:
        """What the taps yield, and J^T v of the parameters of these names; with `meet` that is handed the gradients,
        one by one, and none is kept.
        """
        found: list[Pullback] = []
        total: dict[str, torch.Tensor] = {}
        for part in self.visit():
            if watch is not None and self.apart:
                watch(part.rows, flatten([p.detach() for p in part.parts]))
            pull = _pulled(part, v[part.rows], reading, names, meet)
            if part.rows == slice(0, len(v)):
                return pull
            total = {name: total[name] + g for name, g in pull.gradient.items()} if total else pull.gradient
            found.append(replace(pull, gradient={}))  # of micro-batches only the sum is kept
        missing = {name: why for pull in found for name, why in pull.missing.items()}
        read = [name for name in self.passes.program.parameters if name not in missing]
        return Pullback({name: torch.cat([pull.square_norms[name] for pull in found]) for name in read}, missing, total)


def _pulled(part: Tapped, v: torch.Tensor, reading: Reading, names: Collection[str], meet: Meet | None) -> Pullback:
    """What one backward pass yields of the samples of one forward pass."""
    parameters = part.taps.parameters
    scale = scale_to_one([v], [*part.parts, *parameters.values()])
    cotangents = split(v if scale is None else widened(v) * scale, part.parts)
    used = [(p, w) for p, w in zip(part.parts, cotangents, strict=True) if p.requires_grad]
    if not used:
        nothing = torch.zeros(len(v), device=v.device)
        zeros = {name: torch.zeros_like(parameters[name]) for name in names}
        none = dict.fromkeys(parameters, nothing.sum())
        return Pullback(dict.fromkeys(parameters, nothing), {}, zeros, none)
    if meet is not None:
        meeting = met_one_by_one({name: parameters[name] for name in names}, meet, scale)
        found, _ = part.taps.pull([p for p, _ in used], [w for _, w in used], reading, names, meeting)
        return found if scale is None else found.divided(scale)
    found, grads = part.taps.pull([p for p, _ in used], [w for _, w in used], reading, names)
    gradient = dict(zip(names, dense(grads, [parameters[name] for name in names]), strict=True))
    pulled = replace(found, gradient=gradient)
    return pulled if scale is None else pulled.divided(scale)


def tapped_groups(passes: Passes, size: int) -> Iterator[Tapped]:
    """Micro-batches after their forward pass, one in memory at a time."""
    for start in range(0, passes.samples, size):
        rows = slice(start, min(start + size, passes.samples))
        with Taps(passes.program.parameters, passes.program.replica, rows.stop - start) as taps:
            parts = passes.part(passes.program.parameters, rows).parts
        yield Tapped(rows, parts, taps)


def in_groups(passes: Passes, size: int, outputs: torch.Tensor) -> Samples:
    """Samples whose forward pass is made anew at each visit, `size` of them at a time."""
    return Samples(passes, lambda: tapped_groups(passes, size), outputs)
