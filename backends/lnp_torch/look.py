"""A look at every measurement: what ran apart from the batch is held against the batch's rows.

The plan for a model's samples is made once; a gate may open later, experts fill up, neighbours meet. Outputs of all
samples that run on their own are compared: those of the pilot, of micro-batches, of the general way. Beside them one
random sample is run alone, and its gradient's squared norms are compared too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from array_api_compat import torch as xp

from lnp.contract.linearization import coupling_tolerance, unit
from lnp.per_sample import self_check
from lnp.per_sample.self_check import SMALLER
from lnp.per_sample.verdict import BENT, NOT_FINITE, Verdict, failing, found_interacting
from lnp_torch import fallback
from lnp_torch.outputs import flatten
from lnp_torch.plans import Key, Plan
from lnp_torch.self_check import FATAL, ROUNDED, in_float64, rounding, unclear_up_to
from lnp_torch.taps.backward_pass import Samples
from lnp_torch.taps.reader import Reading

SAMPLES = np.random.default_rng(0)
"""Draws the samples that are looked at, others at each measurement; the user's random states are not touched."""

TWICE, AGAIN = 2.0, 0.125
"""Up to how many times what was rounding differences are taken for it, and the share of measurements that ask anew."""


class CannotRun(RuntimeError):
    """The network raised an error for a part of its batch, although it once ran in parts."""


@dataclass(frozen=True)
class Difference:
    """How far something that ran apart is from the batch.

    Attributes
    ----------
    value:
        Relative, shape ().
    again:
        The batch in float64 -> the same difference there.
    """

    value: torch.Tensor
    again: Callable[[Samples], torch.Tensor]


class Look:
    """What one measurement has seen of samples that ran apart from the batch.

    Parameters
    ----------
    samples:
        The batch.
    plan:
        How its samples are taken apart.
    key:
        What this is remembered for.
    g:
        The loss gradient (N, K).
    tolerance:
        Relative difference from which on samples interact.

    Attributes
    ----------
    reason:
        Why the samples are not to be taken apart after all, or "".
    """

    def __init__(self, samples: Samples, plan: Plan, key: Key, g: torch.Tensor, tolerance: float) -> None:
        self._samples, self._plan, self._key, self._g, self._tolerance = samples, plan, key, g, tolerance
        self._differences: list[Difference] = []
        self._bends: list[torch.Tensor] = []
        self._drawn: tuple[int, torch.Tensor, dict[str, torch.Tensor]] | None = None
        self._pulled, self._passed_over = 0, set[str]()
        self._looked = False
        self.reason = ""

    def is_first(self, index: torch.Tensor | None) -> bool:
        """Whether this is the first pass over all samples (None), or over some of them."""
        over = "all" if index is None else "some"
        first = over not in self._passed_over
        self._passed_over.add(over)
        return first

    def outputs(self, index: torch.Tensor | slice, alone: torch.Tensor) -> None:
        """Outputs (M, K) of some samples, from a pass that left others out."""
        value = self_check.look(xp, self._samples.outputs[index], alone)
        self._differences.append(Difference(value, lambda wide: _outputs_apart(wide, self._plan, index)))

    def square_norms(self, index: torch.Tensor | None, v: torch.Tensor, norms: dict[str, torch.Tensor]) -> None:
        """Squared norms by the rules, {name: (M,)}, of cotangents (M, K). Those of one random sample are kept."""
        self._pulled += 1
        if SAMPLES.random() * self._pulled < 1:  # each pass of a measurement is as likely to be the one
            place = int(SAMPLES.integers(len(v)))
            sample = place if index is None else int(index[place])
            own = {name: norm[place : place + 1] for name, norm in norms.items()}
            self._drawn = sample, v[place : place + 1].clone(), own  # not the cotangents of all
            self._looked = False

    def coupled(self) -> torch.Tensor:
        """Whether samples have turned out to interact, beyond what may be rounding, shape (). Runs one of them alone.

        Nothing is read from the device: `decide` takes the values, once they have come with the measurement's numbers.
        """
        if self._drawn is not None and not self._looked:
            self._looked = True
            with self.running():
                self._run_alone(*self._drawn)
                if self._plan.custom_backward:
                    self._run_largest()
        if not self._differences:
            return torch.zeros((), dtype=torch.bool, device=self._samples.outputs.device)
        largest = torch.stack([difference.value.float() for difference in self._differences]).amax()
        return ~(largest <= unclear_up_to(self._tolerance))  # nan, too

    @property
    def values(self) -> list[torch.Tensor]:
        """What `decide` needs, each of shape ()."""
        return [*(difference.value for difference in self._differences), *self._bends]

    def decide(self, values: list[float]) -> None:
        """Find the reason why samples interact, if they do, from `values` as numbers.

        Raises
        ------
        ValueError
            For a backward pass that is not linear.
        """
        count = len(self._differences)
        if any(bend > self._tolerance for bend in values[count:]):
            raise ValueError(BENT)
        self.reason = self.reason or self._reason(values[:count])
        self._differences.clear()  # which hold this, and so the graph, until the garbage collector comes

    def running(self) -> _Running:
        """Around passes over a part of the batch: whatever the network raises there is a reason."""
        return _Running(self)

    def remember(self) -> None:
        """Samples of this model and shapes interact, from now on."""
        self._key.remember(Plan(Verdict(self.reason), custom_backward=self._plan.custom_backward), found_later=True)

    def _run_alone(self, sample: int, v: torch.Tensor, norms: dict[str, torch.Tensor]) -> None:
        """Compare a sample that is run by itself: outputs, squared norms, and how far its backward pass is bent."""
        found, outputs = _alone(self._samples, sample, v)
        row = self._samples.outputs[sample : sample + 1]
        pairs = [(norms, found)]
        if self._plan.general and not self._samples.apart:  # its squared norms come from single samples themselves
            pairs.append((_in_batch(self._samples, sample, v), found))
        value = self_check.look(xp, row, outputs, pairs)
        self._differences.append(Difference(value, lambda wide: _sample_apart(wide, self._plan, sample, v)))
        if self._plan.custom_backward:
            shorter, _ = _alone(self._samples, sample, v * SMALLER)
            longer = {name: norm / SMALLER**2 for name, norm in shorter.items()}
            self._bends.append(self_check.look(xp, row, row, [(longer, found)]))

    def _run_largest(self) -> None:
        """How far the backward pass is bent at the largest loss gradient, which a clip reaches before all others."""
        u, magnitude = unit(xp, self._g)
        largest = u.abs().amax(dim=1).argmax()[None]
        passes = self._samples.passes.some(largest)
        pull = fallback.looped(passes)
        self._bends.append(self_check.bend_of_loss(xp, partial(fallback.total, pull), u[largest], magnitude))

    def _reason(self, values: list[float]) -> str:
        """Why the samples are not taken apart, or ""; what may be rounding is looked at again in float64."""
        if any(map(math.isnan, values)) and bool(torch.isfinite(self._samples.outputs).all()):
            return NOT_FINITE
        if any(value > unclear_up_to(self._tolerance) for value in values):
            return found_interacting()
        largest = max(values, default=0.0)
        # a whole batch in float64 costs more than the measurement: not each time for rounding as large as before
        known = largest <= TWICE * self._plan.rounded and SAMPLES.random() >= AGAIN
        if largest <= self._tolerance or known:
            return ""
        unclear = [d for d, value in zip(self._differences, values, strict=True) if value > self._tolerance]
        try:
            wide = in_float64(self._samples)
            rounded = all(float(d.again(wide)) <= coupling_tolerance(xp, torch.float64) for d in unclear)
        except Exception:  # a network that is bound to its dtype, or too large
            bound = ROUNDED * rounding(self._samples)
            rounded = largest <= bound
        if not rounded:
            return found_interacting()
        self._key.remember(replace(self._plan, rounded=max(largest, self._plan.rounded)))
        return ""


class _Running:
    """See `Look.running`."""

    def __init__(self, look: Look) -> None:
        self._look = look

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, (*FATAL, CannotRun)):
            self._look.reason = failing(error)
            raise CannotRun(self._look.reason) from error


def _alone(samples: Samples, sample: int, v: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """{name: (1,) squared norm of the gradient of one sample}, and its outputs (1, K), run by itself."""
    parameters = samples.passes.program.parameters
    parts = samples.passes.part(parameters, slice(sample, sample + 1)).parts
    outputs = flatten([part.detach() for part in parts])
    found = fallback.gradient_square_norms(parts, parameters, v)
    return {name: norm.reshape(1) for name, norm in found.items()}, outputs


def _outputs_apart(wide: Samples, plan: Plan, index: torch.Tensor | slice) -> torch.Tensor:
    """How far the outputs of some samples, one by one, are from the batch's."""
    return self_check.look(xp, wide.outputs[index], plan.way.outputs(wide.passes.some(index)))


def _in_batch(samples: Samples, sample: int, v: torch.Tensor) -> dict[str, torch.Tensor]:
    """{name: (1,) squared norm of the gradient of one sample's outputs}, by a backward pass of the whole batch."""
    reading = Reading(frozenset(samples.passes.program.parameters), gradient_norms=True)
    found = samples.tapped(_placed(samples, sample, v), reading).gradient_norms
    return {name: norm.reshape(1) for name, norm in found.items()}


def _placed(samples: Samples, sample: int, v: torch.Tensor) -> torch.Tensor:
    """(N, K): one sample's cotangent (1, K) at its place, zero elsewhere."""
    placed = torch.zeros_like(samples.outputs, dtype=v.dtype)
    placed[sample] = v[0]
    return placed


def _sample_apart(wide: Samples, plan: Plan, sample: int, v: torch.Tensor) -> torch.Tensor:
    """How far one sample, run by itself, is from the batch: outputs and squared norms, also by the rules."""
    v = v.double()
    alone, outputs = _alone(wide, sample, v)
    by_rules = wide.tapped(_placed(wide, sample, v), plan.reading()).square_norms
    own = {name: norm[sample : sample + 1] for name, norm in by_rules.items()}
    row = wide.outputs[sample : sample + 1]
    return self_check.look(xp, row, outputs, [(own, alone), (_in_batch(wide, sample, v), alone)])
