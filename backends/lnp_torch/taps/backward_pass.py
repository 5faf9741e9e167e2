"""Samples taken apart: squared norms of their gradients, from taps where the operations are known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch

from lnp_torch import fallback
from lnp_torch.fallback import Pull, dense
from lnp_torch.float16 import scale_to_one
from lnp_torch.outputs import split, widened
from lnp_torch.replay import Passes
from lnp_torch.taps.function_mode import Taps
from lnp_torch.taps.reader import Layouts, Reading

Norms = dict[str, torch.Tensor]
"""{parameter name: (N,) squared norms}."""


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


@dataclass(frozen=True)
class Verdict:
    """What comparing taps with single samples has shown.

    Attributes
    ----------
    general:
        {parameter that takes the general way: why}.
    layouts:
        {parameter: where its operations have the samples, of LAYOUTS} where not along the first axis.
    pull:
        How single samples are pulled back: `samples.vectorized` or `samples.looped`.
    reason:
        Why the samples are not taken apart, or "".
    """

    general: dict[str, str] = field(default_factory=dict)
    layouts: Layouts = field(default_factory=dict)
    pull: Callable[[Passes], Pull] = fallback.vectorized
    reason: str = ""

    def reading(self, gradient: bool = False, along: torch.Tensor | None = None) -> Reading:
        """How taps are read accordingly."""
        return Reading(frozenset(self.general), self.layouts, gradient, along)


@dataclass(frozen=True)
class Apart:
    """The samples of a batch.

    Attributes
    ----------
    passes:
        Of the batch.
    visit:
        The batch after its forward pass, whole or in micro-batches one after the other.
    outputs:
        (N, K).
    """

    passes: Passes
    visit: Callable[[], Iterable[Tapped]]
    outputs: torch.Tensor

    def square_norms(self, v: torch.Tensor, verdict: Verdict) -> Norms:
        """{name: (N,) array of ||J_nl^T v_n||^2} for every parameter."""
        return self.pulled(v, verdict, verdict.reading(), gradient=False).square_norms

    def pulled(self, v: torch.Tensor, verdict: Verdict, reading: Reading, gradient: bool) -> Pullback:
        """The squared norms, J^T v, and what else the reading asks for, by the same backward pass."""
        found = self.tapped(v, reading, gradient)
        names = list(self.passes.program.parameters)
        missing = [name for name in names if name not in found.square_norms]
        general = fallback.square_norms(verdict.pull(self.passes.restricted(missing)), v) if missing else {}
        norms = {name: found.square_norms[name] if name in found.square_norms else general[name] for name in names}
        return replace(found, square_norms=norms)

    def tapped(self, v: torch.Tensor, reading: Reading, gradient: bool) -> Pullback:
        """What the taps know, and J^T v if it is asked for."""
        found: list[Pullback] = []
        total: list[torch.Tensor] = []
        for part in self.visit():
            pull = _pulled(part, v[part.rows], gradient, reading)
            if part.rows == slice(0, len(v)):
                return pull
            total = [a + b for a, b in zip(total, pull.gradient, strict=True)] if total else pull.gradient
            found.append(replace(pull, gradient=[]))  # of micro-batches only the sum is kept
        missing = {name: why for pull in found for name, why in pull.missing.items()}
        names = [name for name in self.passes.program.parameters if name not in missing]
        norms = {name: torch.cat([pull.square_norms[name] for pull in found]) for name in names}
        return Pullback(norms, missing, total)


@dataclass(frozen=True)
class Pullback:
    """What one pull-back of a cotangent v has shown.

    Attributes
    ----------
    square_norms:
        {name: (N,) array of ||J_nl^T v_n||^2}.
    missing:
        {name of any other parameter: why}.
    gradient:
        J^T v, or [] if it was not asked for.
    gradient_norms:
        {parameter: ||J_l^T v||^2, shape ()}, if they were asked for, of the whole batch.
    along:
        <J_m^T v_m, J^T v> for the samples m that were asked for, shape (M,), or None.
    """

    square_norms: Norms
    missing: dict[str, str]
    gradient: list[torch.Tensor]
    gradient_norms: Norms = field(default_factory=dict)
    along: torch.Tensor | None = None

    def scaled(self, scale: float | torch.Tensor) -> Pullback:
        """What would have been seen had the cotangent been divided by `scale`."""
        divided = lambda norms: {name: norm / scale**2 for name, norm in norms.items()}
        along = None if self.along is None else self.along / scale**2
        return replace(
            self,
            square_norms=divided(self.square_norms),
            gradient=[widened(g) / scale for g in self.gradient],
            gradient_norms=divided(self.gradient_norms),
            along=along,
        )


def _pulled(part: Tapped, v: torch.Tensor, gradient: bool, reading: Reading) -> Pullback:
    leaves = list(part.taps.parameters.values()) if gradient else []
    scale = scale_to_one([v], [*part.parts, *part.taps.parameters.values()])
    cotangents = split(v if scale is None else widened(v) * scale, part.parts)
    used = [(p, w) for p, w in zip(part.parts, cotangents, strict=True) if p.requires_grad]
    if not used:
        none = torch.zeros(len(v), device=v.device)
        nowhere = dict.fromkeys(part.taps.parameters, none)
        zeros = [torch.zeros_like(leaf) for leaf in leaves]
        return Pullback(nowhere, {}, zeros, {name: norm.sum() for name, norm in nowhere.items()})
    outputs, given = ([pair[i] for pair in used] for i in (0, 1))
    found, grads = part.taps.pull(outputs, given, gradient, reading)
    pulled = Pullback(found.square_norms, found.missing, dense(grads, leaves), found.gradient_norms, found.along)
    return pulled if scale is None else pulled.scaled(scale)


def tapped_groups(passes: Passes, size: int) -> Iterator[Tapped]:
    """Micro-batches after their forward pass, one in memory at a time."""
    for start in range(0, passes.samples, size):
        rows = slice(start, min(start + size, passes.samples))
        with Taps(passes.program.parameters) as taps:
            parts = passes.part(passes.program.parameters, rows).parts
        yield Tapped(rows, parts, taps)
