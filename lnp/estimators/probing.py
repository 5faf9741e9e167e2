"""Probing to a tolerance: as many probes, on as many samples, as the standard error asks for, and no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lnp.contract.linearization import Array, Linearization, Namespace, accumulation_dtype

DEGREES_OF_FREEDOM = 7
"""A standard error is trusted to stop the probing once this many differences went into it."""
PILOT = 12
"""Samples of a pilot at least: with 8, stopping where the error happens to look small makes the error bars of all
measurements 7% too short; with 12, less than the 2% that Student's t allows for."""


Count = int | Array
"""A number of probes or of groups; an array of shape () where it depends on values, as in a compiled loop."""


@dataclass(frozen=True)
class Pilot:
    """Probes of some samples, drawn at random.

    Attributes
    ----------
    index:
        The indices of the samples, ascending, shape (M,).
    square_norms:
        v (N, K) -> (R, M) array of ||J_rm^T v_m||^2.
    """

    index: Array
    square_norms: Callable[[Array], Array]


@dataclass(frozen=True)
class Exact:
    """Orthogonal probes that together are exact.

    Attributes
    ----------
    probes:
        How many.
    square_norms:
        () -> (R, G) array, the sums of their squared norms.
    """

    probes: int
    square_norms: Callable[[], Array]


@dataclass(frozen=True)
class Probe:
    """v (N, K) -> (R, G) array of squared norms, one for each row of parameters and group of samples.

    Attributes
    ----------
    square_norms:
        The function.
    groups:
        G.
    rows:
        R.
    pilot:
        Makes the pilot where groups are single samples, or None.
    exact:
        What takes over once the random probes that are still needed are likely to be more, or None.
    """

    square_norms: Callable[[Array], Array]
    groups: int
    rows: int = 1
    pilot: Callable[[], Pilot] | None = None
    exact: Exact | None = None


@dataclass(frozen=True)
class ProbeAverage:
    """The average of the probes that were spent.

    Attributes
    ----------
    mean:
        (R, G) averages over the probes. Of samples that were not probed: the mean of those that were.
    variance:
        (R,) squared standard errors of the sums over groups.
    probes:
        How many cotangents were pulled back for each group.
    groups:
        How many groups were probed: G, or M where the pilot was enough.
    exact:
        1 where orthogonal probes took over, else 0.
    """

    mean: Array
    variance: Array
    probes: Count
    groups: Count
    exact: Count = 0


def pilot_size(samples: int) -> int:
    """M: an eighth of the samples, but as many as a standard error needs; all where that is more than half.

    >>> [pilot_size(samples) for samples in (8, 23, 24, 64, 128, 800)]
    [8, 23, 12, 12, 16, 100]
    """
    size = max(samples // 8, PILOT)
    return size if 2 * size <= samples else samples


def probe_to_tolerance(
    lin: Linearization, probe: Probe, rtol: float, max_probes: int, start: ProbeAverage | None = None
) -> ProbeAverage:
    """Average probes until the standard error of the first row is below `rtol` times its estimate, or `max_probes` are
    spent.

    With k >= 2 probes x_1 ... x_k per group g the squared standard error pools the differences within the groups,

        SE^2 = sum_g sum_i (x_gi - mean_g)^2 / (k (k - 1)),       G (k - 1) degrees of freedom.

    Fewer are enough where one of these says so, in this order:

        N^2/M sum_m (x'_m - mean)^2 / (M - 1)   a pilot, M samples drawn at random and probed once, stands for all N
        N/M sum_m (x_m - x'_m)^2 / 2            all N are probed once, and M of them differ by that from the pilot
        G/(G - 1) sum_g (x_g - mean)^2          all groups are probed once, where there is no pilot

    The first and the last are upper bounds: they hold the spread of the samples' traces beside the probes' noise.
    With `start`, an average of two probes or more, it goes on from there.
    """
    first = _first_probe(lin, probe, rtol, max_probes) if start is None else start
    enough = lin.xp.zeros_like(first.variance[0], dtype=lin.xp.bool)
    if max_probes == 1 or probe.groups > DEGREES_OF_FREEDOM:
        enough = _is_within(lin.xp, first.mean, first.variance, rtol)
    limits = _Limits(lin, probe, rtol, max_probes)
    squares = lin.xp.zeros_like(first.variance) if start is None else limits.squares(start)
    state = first.probes, first.mean, squares
    total, mean, squares = lin.while_loop(lambda state: limits.unfinished(state, enough), limits.add_probe, state)
    return limits.finished(ProbeAverage(mean, limits.variance(total, squares, first.variance), total, first.groups))


@dataclass(frozen=True)
class _Limits:
    """When probing stops. A state is (probes so far, their mean (R, G), the sum of all squared deviations from
    the groups' means (R,)).
    """

    lin: Linearization
    probe: Probe
    rtol: float
    max_probes: int

    @property
    def least(self) -> int:
        """As many probes as give the degrees of freedom: k probes of G groups have G (k - 1)."""
        return min(self.max_probes, 2 + (DEGREES_OF_FREEDOM - 1) // self.probe.groups)

    def add_probe(self, state: tuple) -> tuple:
        """The state after one more probe."""
        count, mean, squares = state
        value = self.probe.square_norms(self.lin.signs(count))
        difference = value - mean
        mean = mean + difference / _factor(self.lin, count + 1)
        return count + 1, mean, squares + self.lin.xp.sum(difference * (value - mean), axis=1)

    def unfinished(self, state: tuple, enough: Array) -> Any:
        """Whether another random probe is due. `enough` says whether the first one was."""
        count, mean, squares = state
        if isinstance(count, int) and 1 < count < self.least:
            return True  # without reading anything from the device
        if isinstance(count, int) and count >= self.max_probes:
            return False
        xp, variance = self.lin.xp, self._pooled(count, squares)
        wide = xp.logical_not(_is_within(xp, mean, variance, self.rtol))
        if self.probe.exact is not None:
            wide = wide & xp.logical_not(self._exact_is_cheaper(count, mean, variance))
        return ((count < self.least) | ((count < self.max_probes) & wide)) & ((count > 1) | xp.logical_not(enough))

    def variance(self, count: Count, squares: Array, of_first: Array) -> Array:
        """Squared standard errors, (R,): of one probe its own estimate."""
        if isinstance(count, int):
            return of_first if count == 1 else self._pooled(count, squares)
        return self.lin.xp.where(count > 1, self._pooled(count, squares), of_first)

    def finished(self, average: ProbeAverage) -> ProbeAverage:
        """The average, or the exact value where the loop has stopped because that is cheaper than going on."""
        exact, count, xp = self.probe.exact, average.probes, self.lin.xp
        if exact is None or (isinstance(count, int) and (count == 1 or count >= self.max_probes)):
            return average
        wide = xp.logical_not(_is_within(xp, average.mean, average.variance, self.rtol))
        over = wide & (count > 1) & (count < self.max_probes)
        return ProbeAverage(
            mean=compute_if(self.lin, over, lambda: (exact.square_norms(),), (average.mean,))[0],
            variance=xp.where(over, xp.zeros_like(average.variance), average.variance),
            probes=count + exact.probes * xp.astype(over, xp.int32),
            groups=average.groups,
            exact=xp.astype(over, xp.int32),
        )

    def _exact_is_cheaper(self, count: Count, mean: Array, variance: Array) -> Array:
        """Whether the random probes that are still needed are likely to be more than the exact ones, shape ()."""
        assert self.probe.exact is not None
        target = self.rtol * self.lin.xp.sum(mean[0, :])
        fewest = _factor(self.lin, count + self.probe.exact.probes)
        return (fewest * target**2 < _factor(self.lin, count) * variance[0]) & (fewest < self.max_probes)

    def squares(self, average: ProbeAverage) -> Array:
        """The sum of squared deviations that an average of several probes was given its error by, (R,)."""
        return average.variance * _factor(self.lin, average.probes * (average.probes - 1))

    def _pooled(self, count: Count, squares: Array) -> Array:
        """Squared standard errors from all differences between probes of one group, (R,)."""
        xp, pairs = self.lin.xp, count * (count - 1)
        pairs = max(pairs, 1) if isinstance(pairs, int) else xp.where(pairs == 0, xp.ones_like(pairs), pairs)
        return squares / _factor(self.lin, pairs)


def _first_probe(lin: Linearization, probe: Probe, rtol: float, max_probes: int) -> ProbeAverage:
    """One probe: of the pilot's samples if that is enough, else of all, with an estimate of its error."""
    xp, groups = lin.xp, probe.groups

    def all_groups() -> Array:
        return probe.square_norms(lin.signs(0))

    size = pilot_size(groups)
    if probe.pilot is None or size == groups or max_probes == 1 or rtol == 0:
        values = all_groups()
        return ProbeAverage(values, _variance_across_groups(xp, values), 1, groups)
    pilot = probe.pilot()
    few = pilot.square_norms(lin.signs(1))
    filled = _fill_with_mean(xp, few, pilot.index, groups)
    bound = groups**2 / size / (size - 1) * _square_deviation(xp, few)
    enough = _is_within(xp, filled, bound, rtol)
    (values,) = compute_if(lin, xp.logical_not(enough), lambda: (all_groups(),), (filled,))
    variance = xp.where(enough, bound, _variance_of_differences(xp, values, few, pilot.index))
    return ProbeAverage(values, variance, 1, groups + (size - groups) * xp.astype(enough, xp.int32))


def _is_within(xp: Namespace, mean: Array, variance: Array, rtol: float) -> Array:
    """Whether the first row's error is within the tolerance, or nan: more probes would not help. Shape ()."""
    return xp.logical_not(variance[0] > (rtol * xp.sum(mean[0, :])) ** 2)


def compute_if(
    lin: Linearization, condition: Array, compute: Callable[[], tuple[Array, ...]], otherwise: tuple[Array, ...]
) -> tuple[Array, ...]:
    """`compute()` where the condition holds; a loop of at most one turn, which every framework has."""

    def body(state: tuple) -> tuple:
        return state[0] + 1, *compute()

    return lin.while_loop(lambda state: (state[0] < 1) & condition, body, (0, *otherwise))[1:]


def _variance_of_differences(xp: Namespace, first: Array, second: Array, index: Array) -> Array:
    """Squared standard error of the first probe's sum from the M samples that have a second, (R,)."""
    difference = second - xp.take(first, index, axis=1)
    return xp.sum(difference * difference, axis=1) * (0.5 * first.shape[1] / second.shape[1])


def _fill_with_mean(xp: Namespace, few: Array, index: Array, samples: int) -> Array:
    """(R, M) values at their places among N samples, the others filled with their mean. (R, N)."""
    everyone = xp.astype(xp.arange(samples, device=getattr(few, "device", None)), index.dtype)
    place = xp.searchsorted(index, everyone)
    place = xp.where(place < index.shape[0], place, xp.zeros_like(place))
    found = xp.take(index, place, axis=0) == everyone
    return xp.where(found[None, :], xp.take(few, place, axis=1), xp.mean(few, axis=1, keepdims=True))


def _variance_across_groups(xp: Namespace, values: Array) -> Array:
    """Squared standard error from the spread across groups, shape (R,); nan for a single group."""
    groups = values.shape[1]
    if groups == 1:
        return values[:, 0] * float("nan")
    return _square_deviation(xp, values) * (groups / (groups - 1))


def _square_deviation(xp: Namespace, values: Array) -> Array:
    """sum_g (x_g - mean)^2, (R,)."""
    spread = values - xp.mean(values, axis=1, keepdims=True)
    return xp.sum(spread * spread, axis=1)


def _factor(lin: Linearization, count: Count) -> Count:
    """A count as a factor: not every framework multiplies integers with floats."""
    return count if isinstance(count, int) else lin.xp.astype(count, accumulation_dtype(lin.xp, lin.outputs.dtype))
