r"""Estimators of tr Theta, the trace of the empirical neural tangent kernel Theta = J J^T.

With v of independent random signs, E ||J^T v||^2 = tr Theta; the cross terms between rows of J are the noise. Taking
the squared norm sample by sample, sum_n ||J_n^T v_n||^2, leaves out all cross terms between samples, and the
variance falls from 2 offdiag ||Theta||_F^2 to 2 sum_n offdiag ||Theta_nn||_F^2. Groups of samples lie between the two.

Source: Hutchinson, Commun. Stat. Simul. Comput. 19 (1990), doi:10.1080/03610919008812866; the per-sample form and its
variance: Nikolaou et al., arXiv 2605.31244, and docs/theory.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

from lnp.contract.linearization import Array, Linearization, accumulation_dtype, device_of
from lnp.estimators.errors import LARGE
from lnp.estimators.probe import Count, Exact, Pilot, Probe, ProbeAverage, pilot_size
from lnp.estimators.probing import probe_to_tolerance

Estimator = Literal["auto", "exact", "per_sample", "grouped", "joint"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
GROUPS = 8
"""Groups that the grouped estimator forms when the batch was not split into micro-batches."""
WAYS = ("per_sample", "exact", "joint")
"""What "per_sample" may turn into while it runs."""
PER_SAMPLE = ("auto", "exact", "per_sample")
"""Estimators that take the samples one at a time where they do not interact."""
Rows = Sequence[Sequence[str]]
"""For each row of an estimate, the parameters whose squared norms it adds; the first row holds all of them."""


@dataclass(frozen=True)
class Settings:
    """How tr Theta is to be estimated, as the user has asked for it.

    Attributes
    ----------
    estimator:
        One of `ESTIMATORS`.
    rtol:
        Relative standard error at which the probing stops.
    max_probes:
        The most random probes to spend.

    Raises
    ------
    ValueError
        For an unknown estimator, a tolerance outside [0, 1], and no probes.
    """

    estimator: Estimator
    rtol: float
    max_probes: int

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ValueError(
                f"Unknown estimator {self.estimator!r}. Expected one of {', '.join(map(repr, ESTIMATORS))}."
            )
        if not (isinstance(self.rtol, Real) and 0 <= self.rtol <= 1):
            raise ValueError(
                f"rtol is {self.rtol!r}. Expected a relative standard error between 0 and 1, such as 0.01 for 1%."
            )
        if not (isinstance(self.max_probes, Integral) and self.max_probes >= 1):
            raise ValueError(f"max_probes is {self.max_probes!r}. Expected an integer >= 1.")


def takes_samples_apart(estimator: Estimator, microbatch: int | None) -> bool:
    """Whether samples may be taken apart, where the backend finds that they do not interact."""
    return estimator in PER_SAMPLE or microbatch is not None


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
        Cotangents that were pulled back for each of these samples.
    samples:
        (N,) estimates of tr Theta_nn, or None where samples were not taken one at a time.
    way:
        0 for `estimator`, or which of `WAYS` was used in its place: that is known only once the numbers are.
    freedom:
        Effective degrees of freedom of the first row's standard error, shape ().
    """

    trace: Array
    standard_error: Array
    estimator: str
    probes: Count
    samples: Array | None = None
    way: Count = 0
    freedom: Array | float = LARGE


def estimate(lin: Linearization, rows: Rows, estimator: str, rtol: float, max_probes: int) -> TraceEstimate:
    """tr Theta by the named estimator (not "auto"), for each row of parameters. Safe to trace and compile."""
    if estimator == "exact":
        return exact_trace(lin, rows)
    probe = {"per_sample": per_sample_probe, "grouped": grouped_probe, "joint": joint_probe}[estimator](lin, rows)
    return estimate_of(lin, estimator, probe_to_tolerance(lin, probe, rtol, max_probes))


def estimate_of(lin: Linearization, estimator: str, average: ProbeAverage) -> TraceEstimate:
    """The estimate that an average of probes is."""
    independent = estimator == "per_sample"
    return TraceEstimate(
        trace=lin.xp.sum(average.mean, axis=1),
        standard_error=lin.xp.sqrt(average.error.variance),
        freedom=average.error.freedom,
        estimator=estimator,
        probes=average.probes,
        samples=average.mean[0, :] if independent else None,
        way=average.exact,
    )


def per_sample_probe(lin: Linearization, rows: Rows) -> Probe:
    """||J_n^T v_n||^2 for each sample n, whose expectation over signs is tr Theta_nn. Samples must not interact."""
    sample_square_norms = lin.sample_square_norms
    assert sample_square_norms is not None, "choose() takes this estimator only where the record has them"
    samples = lin.outputs.shape[0]
    subset = lin.subset

    def square_norms(v: Array) -> Array:
        return _by_row(lin, rows, sample_square_norms(v))

    def pilot() -> Pilot:
        assert subset is not None, "a probe without a subset has no pilot"
        some = subset(pilot_size(samples))

        def pilot_square_norms(v: Array) -> Array:
            return _by_row(lin, rows, some.sample_square_norms(lin.xp.take(v, some.index, axis=0)))

        return Pilot(some.index, pilot_square_norms)

    return Probe(square_norms, samples, len(rows), pilot if subset is not None and lin.subset_pays else None)


def grouped_probe(lin: Linearization, rows: Rows, groups: int = GROUPS) -> Probe:
    """||J_g^T v_g||^2 for groups g of samples; right for any network.

    Without micro-batches each group is a cotangent that is zero on the other samples, and costs one pull-back.
    """
    xp = lin.xp
    group_square_norms = lin.group_square_norms
    if group_square_norms is not None and lin.groups > 1:
        return Probe(lambda v: _by_row(lin, rows, group_square_norms(v)), lin.groups, len(rows))
    samples = lin.outputs.shape[0]
    groups = min(groups, samples)
    bounds = [(samples * g // groups, samples * (g + 1) // groups) for g in range(groups)]

    def square_norms(v: Array) -> Array:
        index = xp.arange(samples, device=device_of(v))[:, None]
        parts = [xp.where((index >= start) & (index < stop), v, xp.zeros_like(v)) for start, stop in bounds]
        return xp.concat([_joint_square_norms(lin, rows, part) for part in parts], axis=1)

    return Probe(square_norms, groups, len(rows))


def joint_probe(lin: Linearization, rows: Rows) -> Probe:
    """||J^T v||^2, whose expectation over signs is tr Theta; right for any network."""
    return Probe(lambda v: _joint_square_norms(lin, rows, v), 1, len(rows))


def exact_trace(lin: Linearization, rows: Rows) -> TraceEstimate:
    """tr Theta = sum over outputs k and samples n of ||J_n^T e_k||^2.

    K probes where samples do not interact, all N*K rows of J one by one where they do.
    """
    independent = lin.sample_square_norms is not None
    exact = exact_probes(lin, per_sample_probe(lin, rows) if independent else joint_probe(lin, rows))
    groups = exact.square_norms()
    total, samples = lin.xp.sum(groups, axis=1), groups[0, :] if independent else None
    return TraceEstimate(total, lin.xp.zeros_like(total), "exact", exact.probes, samples)


def exact_probes(lin: Linearization, probe: Probe) -> Exact:
    """The orthogonal probes that are exact: e_k for every sample at once, or the unit vectors of all rows of J."""
    xp, (samples, outputs) = lin.xp, lin.outputs.shape
    count = outputs if probe.groups == samples else samples * outputs

    def unit(index: int | Array) -> Array:
        one = xp.astype(xp.arange(count, device=device_of(lin.outputs)) == index, lin.outputs.dtype)
        return xp.broadcast_to(xp.reshape(one, (-1, outputs)), (samples, outputs))

    def body(state: tuple) -> tuple:
        index, total = state
        return index + 1, total + probe.square_norms(unit(index))

    def square_norms() -> Array:
        dtype = accumulation_dtype(xp, lin.outputs.dtype)
        zero = xp.zeros((probe.rows, probe.groups), dtype=dtype, device=device_of(lin.outputs))
        return lin.while_loop(lambda state: state[0] < count, body, (0, zero))[1]

    return Exact(count, square_norms)


def _joint_square_norms(lin: Linearization, rows: Rows, v: Array) -> Array:
    """||J_r^T v||^2 for each row of parameters, (R, 1)."""
    if lin.group_square_norms is not None and lin.groups == 1:
        return _by_row(lin, rows, lin.group_square_norms(v))
    pulled = lin.vjp(v)
    return _by_row(lin, rows, lin.inner_products(pulled, pulled))


def _by_row(lin: Linearization, rows: Rows, square_norms: Mapping[str, Array]) -> Array:
    """Add the parameters of each row: {name: (G,) or ()} -> (R, G)."""
    sums = [sum((square_norms[name] for name in row[1:]), start=square_norms[row[0]]) for row in rows]
    dtype = accumulation_dtype(lin.xp, lin.outputs.dtype)  # parameters may be wider than the outputs
    return lin.xp.astype(lin.xp.stack([lin.xp.reshape(total, (-1,)) for total in sums]), dtype, copy=False)
