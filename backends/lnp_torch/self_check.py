"""Whether the samples of a model can be taken apart by taps: found out once by the core's self-check, and remembered.

Once per model, sequence of operations and shapes. What happens first at a later step is seen by `lnp_torch.look`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from array_api_compat import torch as xp

from lnp.contract.linearization import coupling_tolerance
from lnp.per_sample import differences, self_check
from lnp.per_sample.self_check import Alone, Differences, Pulled
from lnp.per_sample.verdict import BENT, Verdict
from lnp_torch import fallback
from lnp_torch.fallback import Way
from lnp_torch.outputs import flatten, widened
from lnp_torch.plans import Key, Plan
from lnp_torch.replay import Passes
from lnp_torch.taps.backward_pass import Samples, in_groups
from lnp_torch.taps.reader import LAYOUTS, Layouts, Reading

FATAL = (torch.OutOfMemoryError,)
"""What is not the network's answer to a part of its batch."""
UNCLEAR, NARROW = 0.3, 20.0
"""Relative difference up to which rounding may be all there is, as a number, and in tolerances of narrow types."""
ROUNDED = 3.0
"""Times the rounding of parameters that sums in another order may differ by, in a network that float64 cannot tell."""


@dataclass
class Operations:
    """The operations of the core's self-check: a batch, and its samples run in one way.

    Attributes
    ----------
    samples:
        The batch.
    before:
        How its taps are read.
    way:
        How single samples are run.
    pairs:
        Whether pairs of samples stand in for the batch's gradient: where it is made of single samples.
    """

    samples: Samples
    before: Plan
    way: Way
    pairs: bool = False
    xp: Any = field(default=xp, init=False)

    def __post_init__(self) -> None:
        self.outputs, self.custom_backward = self.samples.outputs, self.before.custom_backward
        self._cotangent: torch.Tensor | None = None
        self._compared: tuple[Sequence[int], Alone] | None = None

    def pull(self, v: torch.Tensor) -> Pulled:
        """One backward pass of the batch."""
        self._cotangent = v if self._cotangent is None else self._cotangent
        found = self.samples.tapped(v, self.before.reading(), list(self.samples.passes.program.parameters))
        missing = {name: self.before.general.get(name) or why for name, why in found.missing.items()}
        gradient = found.gradient
        if self.pairs:
            index = v.abs().amax(dim=1).nonzero()[:, 0]
            gradient = fallback.total(fallback.looped(self.samples.passes.some(index), 2), v[index])
        return Pulled(gradient, found.square_norms, missing)

    def alone(self, index: Sequence[int], v: torch.Tensor) -> Alone:
        """Some samples, one by one."""
        some = self.samples.passes.some(torch.as_tensor(list(index), device=v.device))
        found = fallback.alone(self.way.pull(some), v)
        self._compared = index, found
        return found

    def outputs_alone(self) -> torch.Tensor:
        """(N, K) outputs of all samples, each run by itself."""
        return self.way.outputs(self.samples.passes)

    def layouts(self, general: Mapping[str, str], tolerance: float) -> Layouts:
        """{parameter: the layout in which its taps say what single samples do} of those that the first axis misses."""
        assert self._compared is not None, "the comparison has run them"
        assert self._cotangent is not None, "the comparison has pulled it back"
        found: dict[str, Any] = {}
        index, alone = self._compared
        for layout in LAYOUTS:
            # a gradient of zero would be right in any layout
            told = [name for name in general if name not in found and bool(alone.square_norms[name].any())]
            tried = dict.fromkeys(told, layout)
            if not tried:
                break
            norms = self.samples.tapped(self._cotangent, Reading(layouts=tried)).square_norms
            for name in tried.keys() & norms.keys():
                # each beside itself: beside all others any guess would do for a parameter that contributes little
                own = {name: norms[name]}, {name: alone.square_norms[name]}
                if float(differences.square_norms_apart(xp, *own, index)[name]) <= 2 * tolerance:
                    found[name] = layout
        return found


def unclear_up_to(tolerance: float) -> float:
    """The relative difference up to which samples are looked at again in float64: deep networks take roundings far."""
    return max(UNCLEAR, NARROW * tolerance)


def plan_for(samples: Samples, key: Key, microbatch: int | None, tolerance: float, custom_backward: bool) -> Plan:
    """How the samples are taken apart: what is remembered, or found out now.

    Raises
    ------
    ValueError
        For a backward pass that is not linear.
    """
    plan = key.recall()
    if plan is None:
        plan = _plan_by_comparison(samples, Plan(custom_backward=custom_backward), microbatch, tolerance)
        if plan.verdict.sure:
            key.remember(plan)
    if plan.verdict.bent:
        raise ValueError(BENT)
    return plan


def _plan_by_comparison(samples: Samples, before: Plan, microbatch: int | None, tolerance: float) -> Plan:
    """The plan by comparing samples at other parameters, and at these."""
    # micro-batches of one sample cannot differ from single samples: pairs can
    pairs, count = microbatch == 1, samples.passes.samples
    sizes = [self_check.BESIDE, count] if count > self_check.BESIDE else [count]
    away, reason = self_check.first_that_runs(
        [partial(_plan_at_moved_parameters, samples, before, microbatch, size, tolerance) for size in sizes], FATAL
    )
    if away is None or away.verdict.bent or away.verdict.reason:
        return away or replace(before, verdict=Verdict(reason=reason))
    here = _plan_at_parameters(samples, away, tolerance, pairs)
    return replace(here, verdict=here.verdict.joined(away.verdict))


def _plan_at_moved_parameters(
    samples: Samples, before: Plan, microbatch: int | None, size: int, tolerance: float
) -> Plan:
    """The plan at other parameters, by some of the samples."""
    return _plan_at_parameters(
        _at_moved_parameters(samples, microbatch, size), before, tolerance, pairs=microbatch == 1
    )


def _plan_at_parameters(samples: Samples, before: Plan, tolerance: float, pairs: bool) -> Plan:
    """The plan at these parameters: by samples that are vectorized or, where that fails or differs, run in a loop.

    A difference that may be rounding is looked at again in float64.
    """
    found, unclear = before, False
    for way in (fallback.VECTORIZED, fallback.LOOPED):
        if before.way is fallback.LOOPED and way is fallback.VECTORIZED:
            continue
        found, worst = _plan_by_one_way(samples, before, way, tolerance, pairs)
        unclear |= tolerance < worst <= unclear_up_to(tolerance)
        if not found.verdict.reason:
            break
    if not (unclear and (found.verdict.reason or len(found.general) > len(before.general))):
        return found
    return _plan_in_float64(samples, before, found, tolerance, pairs)


def _plan_in_float64(samples: Samples, before: Plan, found: Plan, tolerance: float, pairs: bool) -> Plan:
    """The plan in float64, or up to the network's rounding where it does not run in that; what was found if samples
    interact there too.
    """
    try:
        wide = in_float64(samples)
        plan, _ = _plan_by_one_way(wide, before, found.way, coupling_tolerance(xp, torch.float64), pairs)
    except Exception:  # a network that is bound to its dtype, or too large
        plan, _ = _plan_by_one_way(samples, before, found.way, max(tolerance, ROUNDED * rounding(samples)), pairs)
    return found if plan.verdict.reason else plan


def rounding(samples: Samples) -> float:
    """How far the batch's outputs move, relative, when its parameters are rounded in another way.

    That is how far the network itself takes a difference in the last digit; sums in another order make such ones.
    """
    passes, moved = samples.passes, {}
    for number, (name, p) in enumerate(passes.program.parameters.items()):
        last = torch.finfo(p.dtype).eps * differences.irregular(xp, p.numel(), number, p).reshape(p.shape)
        moved[name] = (widened(p.detach()) * (1 + last)).to(p.dtype).requires_grad_()
    return float(
        differences.outputs_apart(xp, flatten([part.detach() for part in passes.whole(moved).parts]), samples.outputs)
    )


def _plan_by_one_way(samples: Samples, before: Plan, way: Way, tolerance: float, pairs: bool) -> tuple[Plan, float]:
    """The plan with single samples run in one way, and the largest difference that could be rounding."""
    operations = Operations(samples, before, way, pairs)
    compared, reason = self_check.first_that_runs([lambda: self_check.compare(operations)], FATAL)
    if compared is None:
        return replace(before, way=way, verdict=Verdict(before.verdict.reason or reason)), 0.0
    differences, missing = _as_numbers(compared[0]), compared[1]
    verdict = differences.verdict(tolerance, missing)
    worst = max(differences.outputs, differences.gradient, *(0.5 * value for value in differences.rules.values()), 0.0)
    plan = replace(before, way=way, verdict=verdict)
    newly = {name: why for name, why in verdict.general if name not in before.general}
    if verdict.reason or not newly or before.layouts:
        return plan, worst
    layouts = operations.layouts(newly, tolerance)
    general = tuple((name, why) for name, why in verdict.general if name not in layouts)
    return replace(plan, layouts=layouts, verdict=replace(verdict, general=general)), worst


def _as_numbers(differences: Differences) -> Differences:
    """The same as numbers, in one transfer."""
    tensors = [differences.outputs, differences.gradient, differences.bend, differences.batch]
    device = tensors[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    values = [t.detach().to(device, dtype) for t in (*tensors, *differences.rules.values())]
    outputs, gradient, bend, batch, *rules = torch.stack(values).tolist()
    return Differences(outputs, gradient, dict(zip(differences.rules, rules, strict=True)), bend, batch)


def _at_moved_parameters(samples: Samples, microbatch: int | None, size: int) -> Samples:
    """Some samples at other parameters: what a gate at zero hides now may matter later in the training.

    Not all samples, for the batch's own graph is in memory too.
    """
    passes = samples.passes
    if passes.samples > size:
        index = torch.linspace(0, passes.samples - 1, size, device=samples.outputs.device).round().long()
        passes = passes.some(index)
    moved = self_check.moved(xp, {name: p.detach() for name, p in passes.program.parameters.items()})
    parameters = {name: p.requires_grad_() for name, p in moved.items()}
    return run_anew(replace(passes, program=replace(passes.program, parameters=parameters)), microbatch)


def in_float64(samples: Samples) -> Samples:
    """The batch run in float64, as a whole."""
    return run_anew(samples.passes.in_float64(), None)


def run_anew(passes: Passes, microbatch: int | None) -> Samples:
    """Samples with a forward pass of their own, kept where it is one."""
    groups = in_groups(passes, microbatch or passes.samples, torch.empty(0))
    visited: Iterable = groups.visit() if microbatch else list(groups.visit())
    if isinstance(visited, list):
        kept = visited
        groups = replace(groups, visit=lambda: kept)
    outputs = torch.cat([flatten([part.detach() for part in group.parts]) for group in groups.visit()])
    return replace(groups, outputs=outputs)
