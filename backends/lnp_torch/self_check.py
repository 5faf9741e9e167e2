"""Whether the samples of a model can be taken apart by taps: found out once, and remembered.

Once per model, sequence of operations and shape, taps are compared with single samples that run on their own. What
differs takes the general way; where single samples differ from the batch itself, they interact, and none are taken
apart. The comparison is made twice: at the parameters as they are, and at others, where nothing is zero by chance. What
neither shows (a gate that opens at a threshold, samples that meet only for some inputs) may show later: the comparison
is made again at the 16th, 32nd, 64th ... measurement.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch

from lnp.contract.trees import leaves as leaves_of
from lnp_torch import fallback
from lnp_torch.fallback import Comparison
from lnp_torch.fingerprint import about, settings
from lnp_torch.outputs import flatten, widened
from lnp_torch.replay import Passes
from lnp_torch.taps.backward_pass import Apart, Norms, Verdict, tapped_groups
from lnp_torch.taps.reader import LAYOUTS, Layouts, Reading

CHECKED = 8
"""Samples that are compared, spread over the batch."""
BESIDE = 17
"""Samples that they are compared beside, at other parameters."""
AGAIN = 16
"""Measurements after which the comparison is made again; a power of two, as all that follow are."""
NAMED = 4
"""Parameters that a note names."""
REMEMBERED = 64
"""Verdicts that are kept for each model."""


@dataclass
class Remembered:
    """A verdict, and how often it was used."""

    verdict: Verdict
    uses: int = 0


def judge(apart: Apart, key: tuple, tolerance: float, pairs: bool) -> Verdict:
    """What is known of this model, sequence of operations and shape; found out where it is not.

    With `pairs`, single samples are what the batch's gradient is made of: pairs of samples stand in for it.
    """
    passes = apart.passes
    first = next(iter(apart.visit()))
    known, microbatch = _verdicts(passes.program.owner), key[1]
    ran = first.taps.program, first.taps.recorded(first.parts)
    key = (*key, *ran, tuple(apart.outputs.shape), *_circumstances(passes))
    if key not in known:
        elsewhere, sure = _compared(_moved(apart, microbatch), tolerance, pairs, None)
        verdict, also = _compared(apart, tolerance, pairs, elsewhere)
        if not (sure and also):
            return verdict
        known[key] = Remembered(verdict)
        while len(known) > REMEMBERED:
            known.popitem(last=False)
    found = known[key]
    found.uses += 1
    if found.uses >= AGAIN and found.uses & (found.uses - 1) == 0 and not found.verdict.reason:
        verdict, sure = _compared(apart, tolerance, pairs, found.verdict)
        found.verdict = verdict if sure else found.verdict
    return found.verdict


def general_note(verdict: Verdict) -> tuple[str, ...]:
    """Which parameters take the general way, and why."""
    if not verdict.general:
        return ()
    named = [f"{name} ({why})" for name, why in verdict.general.items()]
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return (f"single samples run on their own, which is slower, for {', '.join(named[:NAMED])}{more}",)


def _moved(apart: Apart, microbatch: int | None) -> Apart:
    """Some samples at other parameters: what a gate at zero hides now may matter later in the training.

    Not all samples, for the batch's own graph is in memory too; and a number of them that no layer is likely to have.
    """
    passes, program = apart.passes, apart.passes.program
    if passes.samples > BESIDE:
        passes = passes.some(_spread(passes.samples, BESIDE, apart.outputs.device))
    moved = {}
    for number, (name, p) in enumerate(program.parameters.items()):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(number)).to(p.device, p.dtype)
        size = 0.1 + 0.1 * widened(p.detach()).square().mean().sqrt().to(p.dtype)
        moved[name] = (p.detach() + size * noise).requires_grad_()
    passes = replace(passes, program=replace(program, parameters=moved))
    visit = lambda: tapped_groups(passes, microbatch or passes.samples)
    return Apart(passes, visit, torch.cat([flatten([part.detach() for part in group.parts]) for group in visit()]))


def _compared(apart: Apart, tolerance: float, pairs: bool, elsewhere: Verdict | None) -> tuple[Verdict, bool]:
    """The verdict at these parameters; with `elsewhere`, what was found at others is confirmed.

    And whether it is to be remembered: what is not finite shows nothing.
    """
    passes, outputs = apart.passes, apart.outputs
    index = _spread(passes.samples, CHECKED, outputs.device)
    generator = torch.Generator(outputs.device).manual_seed(0)
    signs = torch.randint(0, 2, outputs[index].shape, generator=generator, device=outputs.device)
    # of different lengths: signs alone give the biases of all samples the same norm, whichever sample they belong to
    lengths = torch.linspace(0.5, 1.5, len(index), device=outputs.device)[:, None]
    v = torch.zeros_like(outputs).index_copy(0, index, ((2 * signs - 1) * lengths).to(outputs.dtype))
    alone = passes.some(index)
    before = elsewhere or Verdict()
    tapped = apart.tapped(v, before.reading(), gradient=True)
    norms, gradient = tapped.square_norms, tapped.gradient
    general = {name: before.general.get(name) or why for name, why in tapped.missing.items()}
    if pairs:
        gradient = fallback.total(fallback.looped(alone, 2), v[index])
    reason = ""
    for pull in (fallback.vectorized, fallback.looped):
        try:
            seen = fallback.compare(pull(alone), outputs[index], v[index], gradient)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as error:
            reason = f"one sample alone fails with {type(error).__name__}: {_first_line(error)}"
            continue
        if math.isnan(seen.difference) and all(bool(part.isfinite().all()) for part in (outputs, *gradient)):
            reason = "one sample alone gives numbers that are not finite"
        elif not seen.difference > tolerance:
            general |= _differing(norms, seen, index, tolerance)
            sure = math.isfinite(seen.difference)
            if elsewhere is None:
                return Verdict(*_laid_out(apart, v, index, seen, general, tolerance), pull), sure
            way = pull if pull is fallback.looped else before.pull
            return Verdict(general, before.layouts, way, before.reason), sure
        else:
            changed = f"{seen.difference:.1g} (relative)"
            reason = f"a sample's output or gradient changes by {changed} when the others are left out"
    return Verdict(reason=reason), bool(torch.isfinite(outputs).all())


def _spread(samples: int, count: int, device: torch.device) -> torch.Tensor:
    """Indices of samples, spread over the batch."""
    return torch.linspace(0, samples - 1, min(count, samples), device=device).round().long()


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
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else (type(leaf), about(leaf))
        for leaf in leaves_of(passes.inputs)
    )
    return (
        described,
        settings(program),
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
