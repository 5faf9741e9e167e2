"""Independent probes: their differences within each group tell how far their average is from the trace."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lnp.contract.linearization import Array, Linearization, accumulation_dtype
from lnp.estimators import errors
from lnp.estimators.errors import Error
from lnp.estimators.probe import Count, Probe, ProbeAverage, compute_if, pilot_size

TRUSTED = 5
"""Degrees of freedom from which on a standard error may stop the probing: below, it is small by chance too often."""
State = tuple[Count, Array, Array, Array]
"""Probes so far, their mean (R, G), and what their error is made of: `squares` and `own`, (R, G)."""


@dataclass(frozen=True)
class Independent:
    """Probes of independent signs: their differences within each group tell the error."""

    lin: Linearization
    probe: Probe
    rtol: float
    max_probes: int

    step = 1
    """Probes of one turn."""

    @property
    def least(self) -> int:
        """Probes whose error may be trusted: k probes of G groups have G (k - 1) degrees of freedom at most."""
        return 2 + (TRUSTED - 1) // self.probe.groups

    def first(self) -> tuple[State, Error, Array]:
        """One probe of all groups, its error, and whether it is enough."""
        xp, values = self.lin.xp, self.probe.square_norms(self.lin.signs(0))
        if not self.piloted:
            error = errors.across_groups(xp, values)
        else:
            assert self.probe.pilot is not None, "a pilot was found to be there"
            pilot = self.probe.pilot()
            few = pilot.square_norms(self.lin.signs(1))
            error = errors.of_differences(xp, values, xp.take(values, pilot.index, axis=1), few)
        state = 1, values, xp.zeros_like(values), xp.zeros_like(values)
        return state, error, self.suffices(values, error)

    def turn(self, state: State) -> State:
        """The state after one more probe."""
        count, mean, squares, own = state
        value = self.probe.square_norms(self.lin.signs(count))
        difference = value - mean
        mean = mean + difference / self.factor(count + 1)
        return count + 1, mean, squares + difference * (value - mean), own

    def error(self, state: State) -> Error:
        """Of two probes or more."""
        xp, (count, mean, squares, _) = self.lin.xp, state
        probes = self.factor(count)
        return errors.no_freer_than(xp, errors.within_groups(xp, squares, probes), mean, probes - 1)

    @property
    def piloted(self) -> bool:
        """Whether a pilot may spare a second probe of all samples."""
        several = self.max_probes > 1 and self.rtol > 0
        return several and self.probe.pilot is not None and pilot_size(self.probe.groups) < self.probe.groups

    def suffices(self, mean: Array, error: Error) -> Array:
        """Whether an error is within the tolerance and to be trusted, or nan: more probes would not help. Shape ()."""
        xp = self.lin.xp
        wide = error.variance[0] > (self.rtol * xp.sum(mean[0, :])) ** 2
        nothing = xp.sum(mean[0, :]) != xp.sum(mean[0, :])
        return xp.logical_not(wide | (error.freedom < TRUSTED)) | nothing

    def unfinished(self, state: State, enough: Array) -> Any:
        """Whether another turn is due. `enough` says whether the first probe was."""
        count = state[0]
        if isinstance(count, int):
            if count + self.step > self.max_probes:
                return False
            if self.step < count < self.least:
                return True  # without reading anything from the device
            if count == 1:
                return self.lin.xp.logical_not(enough)
        due = (count < self.least) | self.lin.xp.logical_not(self._done(state))
        return due & (count + self.step <= self.max_probes) & self.lin.xp.logical_not(enough)

    def _done(self, state: State) -> Array:
        """Whether the error is small enough, or the exact value is cheaper than to go on. Shape ()."""
        error = self.error(state)
        done = self.suffices(state[1], error)
        return done if self.probe.exact is None else done | self._exact_is_cheaper(state, error)

    def _exact_is_cheaper(self, state: State, error: Error) -> Array:
        """Whether the random probes that are still needed are likely to be more than the exact ones, shape ()."""
        assert self.probe.exact is not None, "nobody asks otherwise"
        xp, (count, mean, *_) = self.lin.xp, state
        target = self.rtol * xp.sum(mean[0, :])
        fewest, probes = self.factor(count + self.probe.exact.probes), self.factor(count)
        wide = fewest * target**2 < probes * error.variance[0]
        doubtful = fewest * error.freedom < probes * TRUSTED
        return (wide | doubtful) & (fewest < self.max_probes)

    def finished(self, state: State, first: Error, enough: Array) -> ProbeAverage:
        """The average, or the exact value where the loop has stopped because that is cheaper than to go on."""
        xp, exact, (count, mean, squares, own) = self.lin.xp, self.probe.exact, state
        if isinstance(count, int) and count == 1:
            return ProbeAverage(mean, first, 1, squares, own)
        once = enough | (count == 1)
        later = self.error(state)
        pairs = zip((first.variance, first.freedom), (later.variance, later.freedom), strict=True)
        error = Error(*(xp.where(once, of_one, of_all) for of_one, of_all in pairs))
        average = ProbeAverage(mean, error, count - (count - 1) * xp.astype(once, xp.int32), squares, own)
        if exact is None:
            return average
        over = xp.logical_not(once | self.suffices(mean, later)) & (count + self.step <= self.max_probes)
        return replace(
            average,
            mean=compute_if(self.lin, over, lambda: (exact.square_norms(),), (mean,))[0],
            error=Error(
                xp.where(over, xp.zeros_like(error.variance), error.variance),
                xp.where(over, xp.full_like(error.freedom, errors.LARGE), error.freedom),
            ),
            probes=average.probes + exact.probes * xp.astype(over, xp.int32),
            exact=xp.astype(over, xp.int32),
        )

    def factor(self, count: Count) -> Any:
        """A count as a factor: not every framework multiplies integers with floats."""
        xp = self.lin.xp
        return count if isinstance(count, int) else xp.astype(count, accumulation_dtype(xp, self.lin.outputs.dtype))
