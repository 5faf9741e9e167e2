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
from lnp_torch.met import Meet, met_one_by_one
from lnp_torch.other_parameters import moved_parameter, rounded_parameter
from lnp_torch.outputs import flatten, widened
from lnp_torch.plans import Key, Plan
from lnp_torch.replay import Passes
from lnp_torch.sharded import active
from lnp_torch.taps.backward_pass import Samples, Tapped, in_groups
from lnp_torch.taps.reader import LAYOUTS, Layouts, Reading

FATAL = (torch.OutOfMemoryError,)
"""What is not the network's answer to a part of its batch."""
FEW = 2
"""Samples that are also run at a time, where parameters need that."""
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
        self._numbers = {name: number for number, name in enumerate(self.samples.passes.program.parameters)}

    def pull(self, v: torch.Tensor) -> Pulled:
        """One backward pass of the batch."""
        self._cotangent = v if self._cotangent is None else self._cotangent
        parameters, (gradient, meet) = self.samples.passes.program.parameters, self._sketches()
        names = () if self.pairs else list(parameters)
        found = self.samples.tapped(v, self.before.reading(), names, meet=None if self.pairs else meet)
        missing = {name: self.before.general.get(name) or why for name, why in found.missing.items()}
        if self.pairs:
            index = v.abs().amax(dim=1).nonzero()[:, 0]
            with met_one_by_one(parameters, meet):
                fallback.total(fallback.looped(self.samples.passes.some(index), 2), v[index])
        return Pulled(gradient, found.square_norms, missing)

    def alone(self, index: Sequence[int], v: torch.Tensor) -> Alone:
        """Some samples, one by one: one gradient of one sample is in memory at a time."""
        some = self.samples.passes.some(torch.as_tensor(list(index), device=v.device))
        parameters, (gradient, meet) = some.program.parameters, self._sketches()
        outputs, norms = [], []
        for row in range(len(v)):
            parts = some.part(parameters, slice(row, row + 1)).parts
            outputs.append(flatten([part.detach() for part in parts]))
            norms.append(fallback.gradient_square_norms(parts, parameters, v[row : row + 1], meet))
        found = Alone(
            torch.cat(outputs), gradient, {name: torch.stack([n[name] for n in norms]) for name in parameters}
        )
        self._compared = index, found
        return found

    def in_its_way(self, names: Iterable[str], tolerance: float) -> str:
        """Why samples cannot be run in the way that is tried, for these parameters' squared norms; "" if they can."""
        assert self._compared is not None, "the comparison has run them"
        assert self._cotangent is not None, "the comparison has pulled it back"
        (index, alone), every = self._compared, self._cotangent
        rows = torch.as_tensor(list(index)[:FEW], device=every.device)
        some = self.samples.passes.some(rows).restricted(names)
        found, reason = self_check.first_that_runs(
            [lambda: fallback.alone(self.way.pull(some), every[rows], with_sum=False)], FATAL
        )
        if found is None:
            return reason
        looped = {name: norms[:FEW] for name, norms in alone.square_norms.items()}
        apart = differences.square_norms_apart(xp, found.square_norms, looped, None)
        return "" if all(float(value) <= 2 * tolerance for value in apart.values()) else "samples at a time differ"

    def _sketches(self) -> tuple[dict[str, torch.Tensor], Meet]:
        """{parameter: the sketch of its gradient}, zero so far, and what adds a gradient to it."""
        parameters = self.samples.passes.program.parameters
        found = {
            name: widened(torch.zeros(differences.sketch_size(p.numel()), dtype=p.dtype, device=p.device))
            for name, p in parameters.items()
        }

        def meet(name: str, gradient: torch.Tensor) -> None:
            found[name] = found[name] + differences.sketched(xp, gradient.detach(), self._numbers[name])

        return found, meet

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


def plan_for(
    samples: Samples, key: Key, microbatch: int | None, tolerance: float, custom_backward: bool,
    away: Plan | None = None,
) -> Plan:  # fmt: skip
    """How the samples are taken apart: what is remembered, or found out now; `away` at other parameters, if before.

    Raises
    ------
    ValueError
        For a backward pass that is not linear.
    """
    plan = key.recall()
    if plan is None:
        away = away or (None if custom_backward else key.recall_elsewhere())
        away = away or plan_elsewhere(samples, Plan(custom_backward=custom_backward), microbatch, tolerance)
        key.remember_elsewhere(away)
        plan = _plan_here(samples, away, microbatch, tolerance)
        if plan.verdict.sure:
            key.remember(plan)
    if plan.verdict.bent:
        raise ValueError(BENT)
    return plan


def plan_elsewhere(samples: Samples, before: Plan, microbatch: int | None, tolerance: float) -> Plan:
    """The plan by comparing samples at other parameters: of these samples the passes are used, and no graph."""
    count = samples.passes.samples
    sizes = [self_check.BESIDE, count] if count > self_check.BESIDE else [count]
    away, reason = self_check.first_that_runs(
        [partial(_plan_at_moved_parameters, samples, before, microbatch, size, tolerance) for size in sizes], FATAL
    )
    return away or replace(before, verdict=Verdict(reason=reason))


def _plan_here(samples: Samples, away: Plan, microbatch: int | None, tolerance: float) -> Plan:
    """The plan by comparing samples at these parameters, too."""
    if away.verdict.bent or away.verdict.reason:
        return away
    # micro-batches of one sample cannot differ from single samples: pairs can
    here = _plan_at_parameters(samples, away, tolerance, pairs=microbatch == 1)
    return replace(here, verdict=here.verdict.joined(away.verdict))


def _plan_at_moved_parameters(
    samples: Samples, before: Plan, microbatch: int | None, size: int, tolerance: float
) -> Plan:
    """The plan at other parameters, by some of the samples."""
    there = _at_moved_parameters(samples, microbatch, size)
    return _plan_at_parameters(there, before, tolerance, pairs=microbatch == 1, chosen=False)


def _plan_at_parameters(samples: Samples, before: Plan, tolerance: float, pairs: bool, chosen: bool = True) -> Plan:
    """The plan at these parameters: by samples that are vectorized or, where that fails or differs, run in a loop.

    A difference that may be rounding is looked at again in float64: any that keeps samples together at parameters that
    nobody has chosen, where a network may take rounding as far as its outputs are large.
    """
    found, unclear = before, False
    for way in (fallback.VECTORIZED, fallback.LOOPED):
        if before.way is fallback.LOOPED and way is fallback.VECTORIZED:
            continue
        found, worst = _plan_by_one_way(samples, before, way, tolerance, pairs)
        unclear |= tolerance < worst <= unclear_up_to(tolerance)
        if not found.verdict.reason:
            break
    together, more = bool(found.verdict.reason), len(found.general) > len(before.general)
    again = unclear or not chosen if together else unclear and more
    return _plan_in_float64(samples, before, found, tolerance, pairs) if again else found


def _plan_in_float64(samples: Samples, before: Plan, found: Plan, tolerance: float, pairs: bool) -> Plan:
    """The plan in float64, or up to the network's rounding where it does not run in that; what was found if samples
    interact there too.
    """
    samples.let_go()  # two graphs at a time take three times the memory of this one
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
        moved[name] = rounded_parameter(number, p.detach()).requires_grad_()
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
    if verdict.reason:
        return plan, worst
    newly = {name: why for name, why in verdict.general if name not in before.general}
    if newly and not before.layouts:
        layouts = operations.layouts(newly, tolerance)
        general = tuple((name, why) for name, why in verdict.general if name not in layouts)
        plan = replace(plan, layouts=layouts, verdict=replace(verdict, general=general))
    by_itself = [name for name, _ in plan.verdict.general]
    if way is fallback.VECTORIZED and by_itself:
        plan = replace(plan, verdict=replace(plan.verdict, reason=operations.in_its_way(by_itself, tolerance)))
    return plan, worst


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
    parameters, gathering = {}, active()
    for number, (name, p) in enumerate(passes.program.parameters.items()):
        change = partial(moved_parameter, number)
        moved = change(p.detach()) if gathering is None else gathering.changed(p, change)
        parameters[name] = moved.requires_grad_()
    return run_anew(replace(passes, program=replace(passes.program, parameters=parameters)), microbatch)


def in_float64(samples: Samples) -> Samples:
    """The batch run in float64, as a whole."""
    return run_anew(samples.passes.in_float64(), None)


def run_anew(passes: Passes, microbatch: int | None) -> Samples:
    """Samples with a forward pass of their own, kept where it is one."""
    groups, kept = in_groups(passes, microbatch or passes.samples, torch.empty(0)), list[Tapped]()

    def visit() -> Iterable[Tapped]:
        if microbatch:
            return groups.visit()
        if not kept:
            kept.extend(groups.visit())
        return kept

    outputs = torch.cat([flatten([part.detach() for part in group.parts]) for group in visit()])
    return replace(groups, visit=visit, outputs=outputs, let_go=kept.clear)
