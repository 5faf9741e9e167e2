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
        The indices of the samples, shape (M,).
    square_norms:
        v (N, K) -> (R, M) array of ||J_rm^T v_m||^2.
    """

    index: Array
    square_norms: Callable[[Array], Array]


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
    """

    square_norms: Callable[[Array], Array]
    groups: int
    rows: int = 1
    pilot: Callable[[], Pilot] | None = None


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
    """

    mean: Array
    variance: Array
    probes: Count
    groups: Count


def pilot_size(samples: int) -> int:
    """M: an eighth of the samples, but as many as a standard error needs; all where that is more than half.

    >>> [pilot_size(samples) for samples in (8, 23, 24, 64, 128, 800)]
    [8, 23, 12, 12, 16, 100]
    """
    size = max(samples // 8, PILOT)
    return size if 2 * size <= samples else samples


def probe_to_tolerance(lin: Linearization, probe: Probe, rtol: float, max_probes: int) -> ProbeAverage:
    """Average probes until the standard error of the first row is below `rtol` times its estimate, or `max_probes` are
    spent.

    With k >= 2 probes x_1 ... x_k per group g the squared standard error pools the differences within the groups,

        SE^2 = sum_g sum_i (x_gi - mean_g)^2 / (k (k - 1)),       G (k - 1) degrees of freedom.

    Fewer are enough where one of these says so, in this order:

        N^2/M sum_m (x'_m - mean)^2 / (M - 1)   a pilot, M samples drawn at random and probed once, stands for all N
        N/M sum_m (x_m - x'_m)^2 / 2            all N are probed once, and M of them differ by that from the pilot
        G/(G - 1) sum_g (x_g - mean)^2          all groups are probed once, where there is no pilot

    The first and the last are upper bounds: they hold the spread of the samples' traces beside the probes' noise.
    """
    xp = lin.xp
    first = _first_probe(lin, probe, rtol, max_probes)
    enough = xp.zeros_like(first.variance[0], dtype=xp.bool)
    if max_probes == 1 or probe.groups > DEGREES_OF_FREEDOM:
        enough = _is_within(xp, first.mean, first.variance, rtol)
    # as many probes as give the degrees of freedom: k probes of G groups have G (k - 1)
    least = min(max_probes, 2 + (DEGREES_OF_FREEDOM - 1) // probe.groups)

    def body(state: tuple) -> tuple:
        count, mean, squares = state
        value = probe.square_norms(lin.signs(count))
        difference = value - mean
        mean = mean + difference / _factor(lin, count + 1)
        return count + 1, mean, squares + difference * (value - mean)

    def unfinished(state: tuple) -> Any:
        count, mean, squares = state
        if isinstance(count, int) and 1 < count < least:
            return True  # without reading anything from the device
        if isinstance(count, int) and count >= max_probes:
            return False
        wide = xp.logical_not(_is_within(xp, mean, pooled_variance(count, squares), rtol))
        return ((count < least) | ((count < max_probes) & wide)) & ((count > 1) | xp.logical_not(enough))

    def pooled_variance(count: Count, squares: Array) -> Array:
        pairs = count * (count - 1)
        pairs = max(pairs, 1) if isinstance(pairs, int) else xp.where(pairs == 0, xp.ones_like(pairs), pairs)
        return xp.sum(squares, axis=1) / _factor(lin, pairs)

    total, mean, squares = lin.while_loop(unfinished, body, (first.probes, first.mean, xp.zeros_like(first.mean)))
    if isinstance(total, int):
        variance = first.variance if total == 1 else pooled_variance(total, squares)
    else:
        variance = xp.where(total > 1, pooled_variance(total, squares), first.variance)
    return ProbeAverage(mean, variance, total, first.groups)


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
    values = _compute_if(lin, xp.logical_not(enough), all_groups, filled)
    variance = xp.where(enough, bound, _variance_of_differences(xp, values, few, pilot.index))
    return ProbeAverage(values, variance, 1, groups + (size - groups) * xp.astype(enough, xp.int32))


def _is_within(xp: Namespace, mean: Array, variance: Array, rtol: float) -> Array:
    """Whether the first row's error is within the tolerance, or nan: more probes would not help. Shape ()."""
    return xp.logical_not(variance[0] > (rtol * xp.sum(mean[0, :])) ** 2)


def _compute_if(lin: Linearization, condition: Array, compute: Callable[[], Array], otherwise: Array) -> Array:
    """`compute()` where the condition holds; a loop of at most one turn, which every framework has."""

    def body(state: tuple) -> tuple:
        return state[0] + 1, compute()

    return lin.while_loop(lambda state: (state[0] < 1) & condition, body, (0, otherwise))[1]


def _variance_of_differences(xp: Namespace, first: Array, second: Array, index: Array) -> Array:
    """Squared standard error of the first probe's sum from the M samples that have a second, (R,)."""
    difference = second - xp.take(first, index, axis=1)
    return xp.sum(difference * difference, axis=1) * (0.5 * first.shape[1] / second.shape[1])


def _fill_with_mean(xp: Namespace, few: Array, index: Array, samples: int) -> Array:
    """(R, M) values at their places among N samples, the others filled with their mean. (R, N)."""
    mean = xp.mean(few, axis=1, keepdims=True)
    places = xp.astype(xp.arange(samples, device=getattr(few, "device", None))[None, :] == index[:, None], few.dtype)
    return mean + xp.matmul(few - mean, places)


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
