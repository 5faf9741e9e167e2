"""Plans of how a model's samples are taken apart, remembered as long as the model lives."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch

from lnp.contract.linearization import MAPPED_COST
from lnp.contract.trees import leaves
from lnp.per_sample.verdict import Verdict
from lnp_torch import fallback
from lnp_torch.fallback import Way
from lnp_torch.replay import Passes
from lnp_torch.taps.function_mode import Taps
from lnp_torch.taps.reader import Layouts, Reading

REMEMBERED = 64
"""Plans that are kept for each model."""
ELSEWHERE = ("at other parameters",)
"""In the place of a program."""


@dataclass(frozen=True)
class Plan:
    """How the samples of a model are taken apart, as the self-check has found.

    Attributes
    ----------
    verdict:
        Which parameters take the general way.
    layouts:
        Where the operations of others have their samples.
    way:
        How single samples are run.
    custom_backward:
        Whether the network has a backward pass that somebody wrote by hand.
    rounded:
        The largest relative difference between a sample alone and in its batch that was rounding, as float64 showed.
    """

    verdict: Verdict = field(default_factory=Verdict)
    layouts: Layouts = field(default_factory=dict)
    way: Way = fallback.VECTORIZED
    custom_backward: bool = False
    rounded: float = 0.0

    @property
    def general(self) -> dict[str, str]:
        """{parameter that takes the general way: why}."""
        return dict(self.verdict.general)

    def sample_cost(self, samples: int) -> float:
        """What squared norms of all samples cost, in pull-backs of the batch."""
        if not self.general:
            return 1.0
        return MAPPED_COST if self.way is fallback.VECTORIZED else float(samples)

    def reading(self, gradient_norms: bool = False, index: torch.Tensor | None = None) -> Reading:
        """How taps are read accordingly."""
        return Reading(frozenset(self.general), self.layouts, gradient_norms, index)


@dataclass(frozen=True)
class Key:
    """What a plan is remembered for.

    Attributes
    ----------
    owner:
        The user's module or function.
    shapes:
        What decides which function it computes, or how: shapes and dtypes, modes, options.
    program:
        The sequence of operations.
    repeats:
        Whether the same program reads the samples in the same way at the next measurement.
    """

    owner: Any
    shapes: tuple
    program: tuple
    repeats: bool

    def recall(self) -> Plan | None:
        """The plan that is remembered; samples that were found to interact do so in all programs of these shapes."""
        plans = _plans(self.owner)
        found = plans.get(self.shapes)
        return found if found is not None else plans.get((self.shapes, self.program))

    def recall_elsewhere(self) -> Plan | None:
        """What was found at other parameters in an earlier measurement, where each compares samples anew."""
        return _plans(self.owner).get((self.shapes, ELSEWHERE))

    def remember_elsewhere(self, plan: Plan) -> None:
        """Keep what was found at other parameters, for a program that does not repeat: one that moves rows as values
        decide is compared at its own parameters each time, and what a gate at zero hides was looked for once.
        """
        if not (self.repeats or plan.custom_backward or plan.verdict.reason) and plan.verdict.sure:
            _plans(self.owner)[self.shapes, ELSEWHERE] = plan

    def remember(self, plan: Plan, found_later: bool = False) -> None:
        """Keep a plan as long as the owner lives, those that are used last."""
        plans = _plans(self.owner)
        if self.repeats or found_later:
            plans[self.shapes if found_later else (self.shapes, self.program)] = plan
        while len(plans) > REMEMBERED:
            plans.popitem(last=False)


def key_of(passes: Passes, outputs: torch.Tensor, first: tuple[list[torch.Tensor], Taps] | None, options: tuple) -> Key:
    """What a plan is remembered for; `first` are the outputs, and taps on the way to them, of the first pass."""
    program, device = passes.program, passes.program.device.type
    described = tuple(
        (_shape(leaf), leaf.dtype) if isinstance(leaf, torch.Tensor) else (type(leaf), _setting(leaf))
        for leaf in leaves(passes.inputs)
    )
    shapes = (
        *options,
        tuple(outputs.shape),
        described,
        tuple((name, p.dtype) for name, p in program.parameters.items()),
        tuple(module.training for module in program.modules),
        passes.statistics,
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
    )
    if first is None:
        return Key(program.owner, shapes, (), True)
    parts, taps = first
    return Key(program.owner, shapes, (taps.sequence.identity, taps.recorded(parts)), not taps.sequence.reroutes(parts))


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Of a tensor; of a nested one whose samples have different shapes, that of all its numbers."""
    nested = tensor.is_nested and tensor.layout == torch.strided
    return (tensor.size(0), tensor.numel()) if nested else tuple(tensor.shape)


def _setting(value: Any) -> Any:
    """An input that is no tensor, if it is a word, a switch or an integer: they mostly choose between functions."""
    return value if isinstance(value, bool | str | int | None) else None


def _plans(owner: Any) -> OrderedDict[tuple, Plan]:
    """Those of a module or function, as long as it lives; none of what cannot be referred to weakly."""
    try:
        return _PLANS.setdefault(owner, OrderedDict())
    except TypeError:
        return OrderedDict()


_PLANS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
