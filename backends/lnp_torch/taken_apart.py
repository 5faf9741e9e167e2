"""Whether and how the samples of a batch are taken apart: as it is remembered, or found out now."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from array_api_compat import torch as xp

from lnp.contract.linearization import Vector, coupling_tolerance
from lnp.contract.options import Options
from lnp.per_sample.self_check import first_that_runs
from lnp_torch.linear_backward import Joint, custom_backward, refuse_bent
from lnp_torch.look import Look
from lnp_torch.model import Program
from lnp_torch.outputs import flatten
from lnp_torch.plans import Plan, key_of
from lnp_torch.replay import Passes
from lnp_torch.self_check import FATAL, plan_elsewhere, plan_for
from lnp_torch.taps.backward_pass import Samples, in_groups
from lnp_torch.taps.function_mode import Taps


def compared_elsewhere(
    passes: Passes, parts: list[torch.Tensor], taps: Taps, options: Options
) -> Callable[[], Plan] | None:
    """What compares samples at other parameters, and holds nothing of the graph; None where that is known."""
    flat = flatten([part.detach() for part in parts])
    key = key_of(passes, flat, (parts, taps), (options.forward, options.microbatch))
    before = Plan(custom_backward=passes.hooked or taps.hooked or custom_backward(parts))
    if _why_joint(passes) or key.recall() or (not before.custom_backward and key.recall_elsewhere()):
        return None
    samples = in_groups(passes, passes.samples, flat.new_empty(0))
    return partial(plan_elsewhere, samples, before, options.microbatch, tolerance_of(passes.program, parts))


def plan_and_look(
    samples: Samples,
    gradients: Callable[[torch.Tensor], Vector],
    parts: list[torch.Tensor],
    g: torch.Tensor,
    options: Options,
    known: tuple[str, Plan | None] = ("", None),
) -> tuple[Plan | None, Look | None, tuple[str, ...]]:
    """How the samples are taken apart and looked at, and notes; None, None and the reason where they are not.

    `known` is the reason, if there is one, and what was found at other parameters.

    Raises
    ------
    ValueError
        For a backward pass that is not linear, and for micro-batches of samples that interact.
    """
    passes, (reason, away) = samples.passes, known
    tolerance = tolerance_of(passes.program, parts)
    written = passes.hooked or custom_backward(parts)
    if options.split and not reason:
        reason = _why_joint(passes)
        first, failed = (None, reason) if reason else first_that_runs([lambda: next(iter(samples.visit()))], FATAL)
        reason = reason or failed
        if first is not None:
            written = written or first.taps.hooked or custom_backward(first.parts)
            key = key_of(passes, samples.outputs, (first.parts, first.taps), (options.forward, options.microbatch))
            plan = plan_for(samples, key, options.microbatch, tolerance, written, away)
            reason = plan.verdict.reason
            if not reason:
                return plan, Look(samples, plan, key, g, tolerance), plan.verdict.notes
    if options.microbatch is not None:
        raise ValueError(
            f"microbatch={options.microbatch} was asked for, but {reason}. Expected independent samples. Leave "
            "microbatch unset, or remove what couples them."
        )
    if written:
        refuse_bent(Joint(samples.outputs, gradients), g, tolerance)
    return None, None, (reason,) if reason else ()


def _why_joint(passes: Passes) -> str:
    """Why samples are not taken apart, as far as it is known before they are compared; or ""."""
    if not passes.divisible:
        return f"no input runs over the {passes.samples} samples along its first axis: they are not taken apart"
    if not passes.explained:
        return (
            "the network draws random numbers, or writes to parameters, in a way that cannot be repeated: they are "
            "not taken apart"
        )
    return ""


def tolerance_of(prepared: Program, parts: list[torch.Tensor]) -> float:
    """How far two ways to compute the same thing may differ: by the narrowest dtype in use."""
    device = prepared.device.type
    autocast = [torch.get_autocast_dtype(device)] if torch.is_autocast_enabled(device) else []
    dtypes = [p.dtype for p in prepared.parameters.values()] + [part.dtype for part in parts] + autocast
    return coupling_tolerance(xp, max(dtypes, key=lambda dtype: torch.finfo(dtype).eps))
