"""Samples taken apart: squared norms of their gradients, from taps where the operations are known.

Once per model, sequence of operations and shape, taps are compared with single samples that run on their own. What
differs takes the general way; where single samples differ from the batch itself, they interact, and none are taken
apart.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lnp.structure import leaves as leaves_of
from lnp_torch import samples
from lnp_torch.models import Parameters
from lnp_torch.outputs import split, widened
from lnp_torch.passes import Passes
from lnp_torch.reading import LAYOUTS, Kept, Layouts, Reading, along
from lnp_torch.samples import Comparison, Pull, dense
from lnp_torch.scaling import scale_to_one
from lnp_torch.taps import Taps

Norms = dict[str, torch.Tensor]
"""{parameter name: (N,) squared norms}."""

CHECKED = 8
"""Samples that are compared, spread over the batch."""
NAMED = 4
"""Parameters that a note names."""
REMEMBERED = 64
"""Verdicts that are kept for each model."""


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
    pull: Callable[[Passes], Pull] = samples.vectorized
    reason: str = ""

    def reading(self, keep: torch.Tensor | None = None) -> Reading:
        """How taps are read accordingly."""
        return Reading(frozenset(self.general), self.layouts, keep)


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
        return self.pulled(v, verdict, gradient=False).square_norms

    def pulled(
        self, v: torch.Tensor, verdict: Verdict, gradient: bool = True, keep: torch.Tensor | None = None
    ) -> Pullback:
        """The squared norms and, by the same backward pass, J^T v and what is kept of some samples."""
        found = self.tapped(v, verdict.reading(keep), gradient)
        names = list(self.passes.program.parameters)
        missing = [name for name in names if name not in found.square_norms]
        general = samples.square_norms(verdict.pull(self.passes.restricted(missing)), v) if missing else {}
        norms = {name: found.square_norms[name] if name in found.square_norms else general[name] for name in names}
        return replace(found, square_norms=norms)

    def tapped(self, v: torch.Tensor, reading: Reading, gradient: bool) -> Pullback:
        """What the taps know, and J^T v if it is asked for."""
        found = [_pulled(part, v[part.rows], gradient, _of_rows(reading, part.rows)) for part in self.visit()]
        missing = {name: why for pull in found for name, why in pull.missing.items()}
        names = [name for name in self.passes.program.parameters if name not in missing]
        return Pullback(
            {name: torch.cat([pull.square_norms[name] for pull in found]) for name in names},
            missing,
            [sum(grads[1:], start=grads[0]) for grads in zip(*(pull.gradient for pull in found), strict=True)],
            [kept for pull in found for kept in pull.kept],
        )


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
    kept:
        For each part of the batch what is kept of its samples' gradients, and the scale they were pulled back at.
    """

    square_norms: Norms
    missing: dict[str, str]
    gradient: list[torch.Tensor]
    kept: list[tuple[list[Kept], float | torch.Tensor]] = field(default_factory=list)

    def along(self, parameters: Parameters, u: dict[str, torch.Tensor]) -> torch.Tensor:
        """<J_m^T v_m, u> of the samples that were kept, (M,)."""
        sums = [sum(along(one, parameters[one.name], u[one.name]) for one in kept) / scale for kept, scale in self.kept]
        return torch.cat(sums)


def _of_rows(reading: Reading, rows: slice) -> Reading:
    """The reading of a part of the batch, whose samples count from zero."""
    if reading.keep is None:
        return reading
    inside = (reading.keep >= rows.start) & (reading.keep < rows.stop)
    return replace(reading, keep=reading.keep[inside] - rows.start)


def _pulled(part: Tapped, v: torch.Tensor, gradient: bool, reading: Reading) -> Pullback:
    leaves = list(part.taps.parameters.values()) if gradient else []
    scale = scale_to_one([v], [*part.parts, *part.taps.parameters.values()])
    cotangents = split(v if scale is None else widened(v) * scale, part.parts)
    used = [(p, w) for p, w in zip(part.parts, cotangents, strict=True) if p.requires_grad]
    if not used:
        none = torch.zeros(len(v), device=v.device)
        return Pullback(dict.fromkeys(part.taps.parameters, none), {}, [torch.zeros_like(leaf) for leaf in leaves])
    outputs, given = ([pair[i] for pair in used] for i in (0, 1))
    found, grads = part.taps.pull(outputs, given, leaves, reading)
    kept = [(found.kept, 1.0 if scale is None else scale)] if reading.keep is not None and len(reading.keep) else []
    vector = dense(grads, leaves)
    if scale is None:
        return Pullback(found.square_norms, found.missing, vector, kept)
    norms = {name: norm / scale**2 for name, norm in found.square_norms.items()}
    return Pullback(norms, found.missing, [widened(g) / scale for g in vector], kept)


def judge(apart: Apart, key: tuple, tolerance: float, pairs: bool) -> Verdict:
    """What is known of this model, sequence of operations and shape; found out where it is not.

    With `pairs`, single samples are what the batch's gradient is made of: pairs of samples stand in for it.
    """
    passes = apart.passes
    first = next(iter(apart.visit()))
    known = _verdicts(passes.program.owner)
    key = (*key, first.taps.program, tuple(apart.outputs.shape), *_circumstances(passes))
    if key not in known:
        known[key] = _compared(apart, tolerance, pairs)
        while len(known) > REMEMBERED:
            known.popitem(last=False)
    return known[key]


def general_note(verdict: Verdict) -> tuple[str, ...]:
    """Which parameters take the general way, and why."""
    if not verdict.general:
        return ()
    named = [f"{name} ({why})" for name, why in verdict.general.items()]
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return (f"single samples run on their own, which is slower, for {', '.join(named[:NAMED])}{more}",)


def _compared(apart: Apart, tolerance: float, pairs: bool) -> Verdict:
    passes, outputs = apart.passes, apart.outputs
    index = torch.linspace(0, passes.samples - 1, min(CHECKED, passes.samples), device=outputs.device).round().long()
    generator = torch.Generator(outputs.device).manual_seed(0)
    signs = torch.randint(0, 2, outputs[index].shape, generator=generator, device=outputs.device)
    # of different lengths: signs alone give the biases of all samples the same norm, whichever sample they belong to
    lengths = torch.linspace(0.5, 1.5, len(index), device=outputs.device)[:, None]
    v = torch.zeros_like(outputs).index_copy(0, index, ((2 * signs - 1) * lengths).to(outputs.dtype))
    alone = passes.some(index)
    tapped = apart.tapped(v, Reading(), gradient=True)
    norms, general, gradient = tapped.square_norms, dict(tapped.missing), tapped.gradient
    if pairs:
        gradient = samples.total(samples.looped(alone, 2), v[index])
    reason = ""
    for pull in (samples.vectorized, samples.looped):
        try:
            seen = samples.compare(pull(alone), outputs[index], v[index], gradient)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as error:
            reason = f"one sample alone fails with {type(error).__name__}: {_first_line(error)}"
            continue
        if not seen.difference > tolerance:
            general |= _differing(norms, seen, index, tolerance)
            return Verdict(*_laid_out(apart, v, index, seen, general, tolerance), pull)
        reason = (
            f"a sample's output or gradient changes by {seen.difference:.1g} (relative) when the others are left out"
        )
    return Verdict(reason=reason)


def _laid_out(
    apart: Apart, v: torch.Tensor, index: torch.Tensor, seen: Comparison, general: dict, tolerance: float
) -> tuple[dict[str, str], dict[str, str]]:
    """(parameters that take the general way in every layout, layouts that others were found in)."""
    layouts: Layouts = {}
    for layout in LAYOUTS:
        tried = dict.fromkeys(general, layout)
        if tried:
            found = apart.tapped(v, Reading(layouts=tried), gradient=False)
            wrong = found.missing | _differing(found.square_norms, seen, index, tolerance)
            layouts |= {name: layout for name in tried if name not in wrong}
            general = {name: why for name, why in general.items() if name in wrong}
    return general, layouts


def _differing(norms: Norms, seen: Comparison, index: torch.Tensor, tolerance: float) -> dict[str, str]:
    """Parameters whose taps do not say what single samples do: another value, or anything where nothing went in."""
    if not norms:
        return {}
    others = torch.ones_like(next(iter(norms.values())), dtype=torch.bool).index_fill(0, index, False)
    total = sum(norm.double() for norm in seen.square_norms.values())
    found = []
    for name, norm in norms.items():
        expected = seen.square_norms[name].double()
        missed = (norm[index].double() - expected).abs() / (expected + 1e-3 * total).clamp_min(1e-300)
        leaked = torch.where(others, norm.double(), 0.0).amax() / total.amax().clamp_min(1e-300)
        found.append(torch.maximum(missed.amax(), leaked))
    wrong = torch.stack(found).tolist()
    return {
        name: "its taps differ from single samples"
        for name, w in zip(norms, wrong, strict=True)
        if not w <= 2 * tolerance
    }


def _circumstances(passes: Passes) -> tuple:
    """What else decides which function a model computes, or how."""
    program, device = passes.program, passes.program.device.type
    described = tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf)
        for leaf in leaves_of(passes.inputs)
    )
    return (
        described,
        tuple((name, p.dtype) for name, p in program.parameters.items()),
        tuple(module.training for module in program.modules),
        passes.statistics,
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
    )


def _verdicts(owner: Any) -> OrderedDict:
    """Those of a module or function, as long as it lives; none of what cannot be referred to weakly."""
    try:
        return _VERDICTS.setdefault(owner, OrderedDict())
    except TypeError:
        return OrderedDict()


_VERDICTS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120]
