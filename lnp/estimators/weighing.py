"""Which estimator of the trace is used: what each is likely to cost for the error bar that is asked for.

Costs are in pull-backs of the batch. What is known beforehand is weighed beforehand; how noisy probes are is not known
before some were made, so two decisions are left to run time: after a few random probes of single samples orthogonal
ones take over if they are fewer than the rest, and where single samples are dear, a few probes of the whole batch tell
first whether it can do without them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lnp.contract.linearization import Array, Linearization, device_of
from lnp.estimators.independent import TRUSTED
from lnp.estimators.probe import Count, Probe, compute_if
from lnp.estimators.probing import probe_to_tolerance
from lnp.estimators.signs import Signs
from lnp.estimators.trace import (
    WAYS,
    Rows,
    TraceEstimate,
    estimate,
    estimate_of,
    exact_probes,
    joint_probe,
    per_sample_probe,
)

TYPICAL_DEVIATION, BALANCED = 0.1, 0.05
"""Relative standard deviation of one sample's probe: 0.03 to 0.25 on networks of many kinds, and 0.01 to 0.1 of what is
left where signs are balanced (docs/theory.md)."""
EXACT_ROWS = 16
"""`auto` takes all N*K rows one by one up to this many, where samples interact."""
TRIAL = 8
"""Probes of the whole batch that tell how noisy they are: the fewest whose standard error is trusted."""
DEAR = 4 * TRIAL
"""Pull-backs from which a trial of the whole batch is worth its cost: it is a quarter of what it may save."""


@dataclass(frozen=True)
class Choice:
    """The estimator that is used.

    Attributes
    ----------
    estimator:
        "exact", "per_sample", "grouped" or "joint".
    notes:
        Why it is not the one that was asked for.
    weighed:
        Whether "per_sample" may give way while it runs: to "exact", and to "joint" where that is cheaper.
    """

    estimator: str
    notes: tuple[str, ...] = ()
    weighed: bool = False


def choose(lin: Linearization, estimator: str, rtol: float, max_probes: int) -> Choice:
    """The estimator that is used when the user asks for `estimator`, and notes where it is another one."""
    samples, outputs = lin.outputs.shape
    independent = lin.sample_square_norms is not None
    if estimator == "auto":
        balanced = isinstance(lin.signs, Signs) and lin.signs.balanced
        if independent and outputs <= _exact_from_the_start(samples, rtol, max_probes, balanced):
            return Choice("exact")
        if independent:
            return Choice("per_sample", weighed=True)
        if samples * outputs <= EXACT_ROWS:
            return Choice("exact")
        return Choice("joint" if lin.groups == 1 else "grouped")
    if estimator == "per_sample" and not independent:
        note = "the joint estimator replaces the per-sample one, which needs samples that do not interact"
        return Choice("joint", (note,))
    return Choice(estimator)


def expected_probes(samples: int, rtol: float, max_probes: int, balanced: bool = False) -> float:
    """Random probes that the tolerance is likely to ask for: as many orthogonal ones, if K is no more, are exact.

    >>> expected_probes(samples=16, rtol=0.01, max_probes=64)
    6.25
    """
    if rtol == 0:
        return max_probes
    deviation = BALANCED if balanced else TYPICAL_DEVIATION
    return min(max_probes, max(_fewest(samples), (deviation / rtol) ** 2 / samples))


def _fewest(samples: int) -> int:
    """What probing to a tolerance costs at least, in probes, whose differences have to tell an error to be trusted."""
    return max(2, -(-2 * TRUSTED // samples))


def _exact_from_the_start(samples: int, rtol: float, max_probes: int, balanced: bool) -> float:
    """Outputs up to which exact probes are made at once. Where random ones are likely to be more than the fewest, they
    may as well prove too noisy, and the exact ones then come on top of the fewest.
    """
    likely = expected_probes(samples, rtol, max_probes, balanced)
    return likely + _fewest(samples) if _fewest(samples) < likely < max_probes else likely


def estimate_chosen(
    lin: Linearization, rows: Rows, choice: Choice, rtol: float, max_probes: int, apart: bool = False
) -> TraceEstimate:
    """tr Theta by the chosen estimator, for each row of parameters. Safe to trace and compile.

    `apart` says that single samples are needed for more than the trace.
    """
    if not choice.weighed:
        return estimate(lin, rows, choice.estimator, rtol, max_probes)
    probe = per_sample_probe(lin, rows)
    probe = replace(probe, exact=exact_probes(lin, probe))
    cost = lin.sample_cost * expected_probes(lin.outputs.shape[0], rtol, max_probes)
    if apart or cost < DEAR or rtol == 0 or max_probes <= TRIAL:
        return estimate_of(lin, "per_sample", probe_to_tolerance(lin, probe, rtol, max_probes))
    return _joint_if_cheaper(lin, rows, probe, rtol, max_probes, cost)


def _joint_if_cheaper(
    lin: Linearization, rows: Rows, apart: Probe, rtol: float, max_probes: int, cost: float
) -> TraceEstimate:
    """A few probes of the whole batch; more of them where that reaches the tolerance for less than `cost`, the likely
    cost of single samples; single samples otherwise.
    """
    xp, joint = lin.xp, joint_probe(lin, rows)
    trial = probe_to_tolerance(lin, joint, rtol, TRIAL)
    target = (rtol * xp.sum(trial.mean[0, :])) ** 2
    pays = TRIAL * trial.error.variance[0] <= min(max_probes, cost) * target

    def values(probe: Probe, **start: Any) -> tuple[Array, ...]:
        average = probe_to_tolerance(lin, probe, rtol, max_probes, **start)
        counts = _array(lin, average.probes), _array(lin, average.exact)
        return xp.sum(average.mean, axis=1), average.error.variance, average.error.freedom, *counts

    none = _array(lin, 0)
    nothing = xp.zeros_like(trial.error.variance), trial.error.variance, trial.error.freedom, none, none
    whole = compute_if(lin, pays, lambda: values(joint, start=trial), nothing)
    single = compute_if(lin, xp.logical_not(pays), lambda: values(apart), nothing)
    total, variance, freedom, probes, exact = (xp.where(pays, w, s) for w, s in zip(whole, single, strict=True))
    joint_way = _array(lin, WAYS.index("joint"))
    return TraceEstimate(
        total,
        xp.sqrt(variance),
        "per_sample",
        probes,
        way=xp.where(pays, joint_way, exact),
        freedom=freedom,
    )


def _array(lin: Linearization, count: Count) -> Array:
    """A count as an array of shape ()."""
    return lin.xp.asarray(count, dtype=lin.xp.int32, device=device_of(lin.outputs))
