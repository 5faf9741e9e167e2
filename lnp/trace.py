r"""Estimators of tr Theta, the trace of the empirical neural tangent kernel Theta = J J^T.

With v of independent random signs, E ||J^T v||^2 = tr Theta; the cross terms between rows of J are the noise. Taking
the squared norm sample by sample, sum_n ||J_n^T v_n||^2, leaves out all cross terms between samples, and the
variance falls from 2 offdiag ||Theta||_F^2 to 2 sum_n offdiag ||Theta_nn||_F^2. Groups of samples lie between the two.

Source: Hutchinson, Commun. Stat. Simul. Comput. 19 (1990), doi:10.1080/03610919008812866; the per-sample form and its
variance: Nikolaou et al., arXiv 2605.31244, and docs/theory.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lnp.linearization import Array, Linearization, accumulation_dtype

ESTIMATORS = ("auto", "exact", "per_sample", "grouped", "joint")
GROUPS = 8
"""Groups that the grouped estimator forms when the batch was not split into micro-batches."""
EXACT_OUTPUTS = 8
"""`auto` is exact up to this many outputs per sample: as many probes as the tolerance could ask for."""
EXACT_ROWS = 16
"""`auto` takes all N*K rows one by one up to this many, where samples interact."""
DEGREES_OF_FREEDOM = 7
"""A standard error is trusted to stop the probing once this many differences went into it."""

Rows = Sequence[Sequence[str]]
"""For each row of an estimate, the parameters whose squared norms it adds; the first row holds all of them."""


@dataclass(frozen=True)
class TraceEstimate:
    """tr Theta and its error, one entry for each row of parameters.

    Attributes
    ----------
    trace:
        (R,) estimates of tr Theta_r = ||J_r||_F^2.
    standard_error:
        (R,) standard errors; 0 for the exact estimator, nan where one probe of one group cannot tell.
    estimator:
        "exact", "per_sample", "grouped" or "joint".
    probes:
        Cotangents that were pulled back.
    samples:
        (N,) estimates of tr Theta_nn, or None where samples were not taken one at a time.
    """

    trace: Array
    standard_error: Array
    estimator: str
    probes: Any
    samples: Array | None = None


def choose(lin: Linearization, estimator: str) -> tuple[str, tuple[str, ...]]:
    """The estimator that is used when the user asks for `estimator`, and notes where it is another one."""
    samples, outputs = lin.outputs.shape
    independent = lin.sample_square_norms is not None
    if estimator == "auto":
        if independent:
            return ("exact" if outputs <= EXACT_OUTPUTS else "per_sample"), ()
        if samples * outputs <= EXACT_ROWS:
            return "exact", ()
        return ("joint" if lin.group_square_norms is None else "grouped"), ()
    if estimator == "per_sample" and not independent:
        return "joint", ("the joint estimator replaces the per-sample one, which needs samples that do not interact",)
    return estimator, ()


def estimate(lin: Linearization, rows: Rows, estimator: str, rtol: float, max_probes: int) -> TraceEstimate:
    """tr Theta by the named estimator (not "auto"), for each row of parameters. Safe to trace and compile."""
    if estimator == "exact":
        return exact(lin, rows)
    probe = {"per_sample": per_sample, "grouped": grouped, "joint": joint}[estimator](lin, rows)
    return to_tolerance(lin, probe, len(rows), estimator, rtol, max_probes)


@dataclass(frozen=True)
class Probe:
    """v -> (R, G) array of squared norms, one for each row of parameters and group of samples."""

    square_norms: Callable[[Array], Array]
    groups: int
    rows: Rows = ()


def per_sample(lin: Linearization, rows: Rows) -> Probe:
    """||J_n^T v_n||^2 for each sample n, whose expectation over signs is tr Theta_nn. Samples must not interact."""
    square_norms = lin.sample_square_norms
    assert square_norms is not None, "choose() takes this estimator only where the record has them"
    return Probe(lambda v: _by_row(lin, rows, square_norms(v)), lin.outputs.shape[0], rows)


def grouped(lin: Linearization, rows: Rows, groups: int = GROUPS) -> Probe:
    """||J_g^T v_g||^2 for groups g of samples; right for any network.

    Without micro-batches each group is a cotangent that is zero on the other samples, and costs one pull-back.
    """
    xp = lin.xp
    of_groups = lin.group_square_norms
    if of_groups is not None:
        return Probe(lambda v: _by_row(lin, rows, of_groups(v)), lin.groups)
    samples = lin.outputs.shape[0]
    groups = min(groups, samples)
    bounds = [(samples * g // groups, samples * (g + 1) // groups) for g in range(groups)]

    def square_norms(v: Array) -> Array:
        index = xp.arange(samples, device=_device(v))[:, None]
        parts = [xp.where((index >= start) & (index < stop), v, xp.zeros_like(v)) for start, stop in bounds]
        return xp.concat([_pulled_back(lin, rows, part) for part in parts], axis=1)

    return Probe(square_norms, groups)


def joint(lin: Linearization, rows: Rows) -> Probe:
    """||J^T v||^2, whose expectation over signs is tr Theta; right for any network."""
    return Probe(lambda v: _pulled_back(lin, rows, v), 1)


def exact(lin: Linearization, rows: Rows) -> TraceEstimate:
    """tr Theta = sum over outputs k and samples n of ||J_n^T e_k||^2.

    K probes where samples do not interact, all N*K rows of J one by one where they do.
    """
    xp, (samples, outputs) = lin.xp, lin.outputs.shape
    if lin.sample_square_norms is not None:
        probe, count = per_sample(lin, rows), outputs
    else:
        probe, count = joint(lin, rows), samples * outputs

    def unit(index: Any) -> Array:
        """e_k for every sample at once, or the unit vector of one row of J."""
        at = xp.astype(xp.arange(count, device=_device(lin.outputs)) == index, lin.outputs.dtype)
        return xp.broadcast_to(xp.reshape(at, (-1, outputs)), (samples, outputs))

    def body(state: tuple) -> tuple:
        index, total = state
        return index + 1, total + probe.square_norms(unit(index))

    _, groups = lin.while_loop(lambda state: state[0] < count, body, (0, _zeros(lin, (len(rows), probe.groups))))
    total = xp.sum(groups, axis=1)
    apart = lin.sample_square_norms is not None
    return TraceEstimate(total, xp.zeros_like(total), "exact", count, groups[0, :] if apart else None)


def to_tolerance(
    lin: Linearization, probe: Probe, rows: int, estimator: str, rtol: float, max_probes: int
) -> TraceEstimate:
    """Average probes until the standard error is below `rtol` times the estimate, or `max_probes` are spent.

    With k >= 2 probes x_1 ... x_k per group g the standard error pools the differences within the groups,
    SE^2 = sum_g sum_i (x_gi - mean_g)^2 / (k (k - 1)), G (k - 1) degrees of freedom. One probe is enough if the spread
    across groups, an upper bound, says so: SE^2 <= G/(G - 1) sum_g (x_g - mean)^2; or if a second probe of M samples
    drawn at random does: SE^2 = N/M sum_m (x_m - x'_m)^2 / 2.
    """
    xp = lin.xp
    least = min(max_probes, 2 + (DEGREES_OF_FREEDOM - 1) // probe.groups)
    first = probe.square_norms(lin.signs(0))
    enough, single = _of_one(lin, probe, first, rtol, estimator, max_probes)

    def body(state: tuple) -> tuple:
        count, mean, squares = state
        value = probe.square_norms(lin.signs(count))
        difference = value - mean
        mean = mean + difference / _number(lin, count + 1)
        return count + 1, mean, squares + difference * (value - mean)

    def unfinished(state: tuple) -> Any:
        count, mean, squares = state
        if isinstance(count, int) and 1 < count < least:
            return True  # known without reading anything from the device
        if isinstance(count, int) and count >= max_probes:
            return False
        pairs = _number(lin, count * (count - 1))
        wide = xp.sum(squares[0, :]) > (rtol * xp.sum(mean[0, :])) ** 2 * pairs
        return ((count < least) | ((count < max_probes) & wide)) & ((count > 1) | xp.logical_not(enough))

    count, mean, squares = lin.while_loop(unfinished, body, (1, first, xp.zeros_like(first)))
    if isinstance(count, int):
        variance = single if count == 1 else xp.sum(squares, axis=1) / (count * (count - 1))
    else:
        pairs = xp.where(count > 1, count * (count - 1), xp.ones_like(count))
        variance = xp.where(count > 1, xp.sum(squares, axis=1) / _number(lin, pairs), single)
    apart = mean[0, :] if estimator == "per_sample" else None
    return TraceEstimate(xp.sum(mean, axis=1), xp.sqrt(variance), estimator, count, apart)


def _of_one(
    lin: Linearization, probe: Probe, first: Array, rtol: float, estimator: str, max_probes: int
) -> tuple[Array, Array]:
    """(whether one probe meets the tolerance, its squared standard error or an upper bound, shape (R,))."""
    xp = lin.xp
    allowed = (rtol * xp.sum(first[0, :])) ** 2
    bound = _across(xp, first)
    few = probe.groups <= DEGREES_OF_FREEDOM
    enough = xp.zeros_like(bound[0], dtype=xp.bool) if few else bound[0] <= allowed
    size = pilot_size(probe.groups)
    if estimator != "per_sample" or lin.subset is None or size >= probe.groups or max_probes == 1:
        return enough, bound

    def pilot(state: tuple) -> tuple:
        subset = lin.subset(size)
        second = _by_row(lin, probe.rows, subset.sample_square_norms(xp.take(lin.signs(1), subset.index, axis=0)))
        difference = second - xp.take(first, subset.index, axis=1)
        return state[0] + 1, xp.sum(difference * difference, axis=1) * (0.5 * probe.groups / size)

    _, variance = lin.while_loop(lambda state: (state[0] < 1) & xp.logical_not(enough), pilot, (0, bound))
    return variance[0] <= allowed, variance


def pilot_size(samples: int) -> int:
    """Samples that are probed a second time to learn the error of the first probe."""
    return min(max(samples // 8, DEGREES_OF_FREEDOM + 1), 32)


def _across(xp: Any, values: Array) -> Array:
    """Squared standard error from the spread across groups, shape (R,); nan for a single group."""
    groups = values.shape[1]
    if groups == 1:
        return values[:, 0] * float("nan")
    spread = values - xp.mean(values, axis=1, keepdims=True)
    return xp.sum(spread * spread, axis=1) * (groups / (groups - 1))


def _pulled_back(lin: Linearization, rows: Rows, v: Array) -> Array:
    pulled = lin.vjp(v)
    return _by_row(lin, rows, lin.inner_products(pulled, pulled))


def _by_row(lin: Linearization, rows: Rows, square_norms: Mapping[str, Array]) -> Array:
    """Add the parameters of each row: {name: (G,) or ()} -> (R, G)."""
    sums = [sum((square_norms[name] for name in row[1:]), start=square_norms[row[0]]) for row in rows]
    dtype = accumulation_dtype(lin.xp, lin.outputs.dtype)  # parameters may be wider than the outputs
    return lin.xp.astype(lin.xp.stack([lin.xp.reshape(total, (-1,)) for total in sums]), dtype, copy=False)


def _number(lin: Linearization, count: Any) -> Any:
    """A count as a factor: not every framework multiplies integers with floats."""
    return count if isinstance(count, int) else lin.xp.astype(count, accumulation_dtype(lin.xp, lin.outputs.dtype))


def _zeros(lin: Linearization, shape: Any) -> Array:
    dtype = accumulation_dtype(lin.xp, lin.outputs.dtype)
    return lin.xp.zeros(shape, dtype=dtype, device=_device(lin.outputs))


def _device(array: Array) -> Any:
    return getattr(array, "device", None)
