"""Checks of the estimators of tr Theta: enumerated, replayed from the record's signs, and chosen as they should be."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from lnp.contract.linearization import device_of
from lnp.estimators import trace
from lnp.estimators.weighing import expected_probes
from lnp.testing import scenarios
from lnp.testing.kit import Case, Kit

REPLAYED: dict[str, Any] = {"rtol": 0.0, "max_probes": 3, "seed": 5}
"""A few probes whose signs the record gives away."""


def enumerated_signs_give_trace_and_variance(kit: Kit) -> None:
    """Over all sign vectors the mean of each estimator is tr Theta, and its variance that of docs/theory.md."""
    for case in kit.cases(scenarios.LINEAR, scenarios.prescribed(), dtypes=1):
        lin, truth = kit.record(case.scenario), case.truth
        rows = [tuple(truth.jacobians), *((name,) for name in truth.jacobians)]
        samples, outputs = truth.shape
        signs = [np.reshape(s, truth.shape) for s in itertools.product((-1.0, 1.0), repeat=samples * outputs)]
        probes = {
            "per sample": (trace.per_sample_probe(lin, rows), list(range(samples))),
            "grouped": (trace.grouped_probe(lin, rows, groups=2), [0, samples // 2]),
            "joint": (trace.joint_probe(lin, rows), [0]),
        }
        for name, (probe, starts) in probes.items():
            case.true(probe.groups == len(starts), f"{name}: {probe.groups} groups, expected {len(starts)}")
            values = np.stack([_enumerated(kit, lin, probe, v) for v in signs])
            case.true(
                values.shape[1:] == (len(rows), len(starts)), f"{name}: squared norms of shape {values.shape[1:]}"
            )
            totals = values.sum(axis=2)
            case.equal(
                f"{name}: mean over all signs", totals.mean(axis=0), [np.trace(truth.kernel(row)) for row in rows]
            )
            variances = [truth.variance(starts, row) for row in rows]
            case.equal(f"{name}: variance over all signs", totals.var(axis=0), variances)


def estimators_average_their_probes(kit: Kit) -> None:
    """chi_net and its standard error are those of the signs that the record hands out, for each estimator. Where they
    are balanced, single samples get them in pairs that swap.
    """
    for case in [*kit.cases(scenarios.MANY), *kit.cases(scenarios.WIDE, dtypes=1)]:
        samples, signs = case.truth.shape[0], _drawn(case)
        groups = list(scenarios.MANY_GROUPS) if case.scenario.name == scenarios.MANY.name else list(range(samples))
        for estimator, starts in (("per_sample", list(range(samples))), ("grouped", groups), ("joint", [0])):
            d = kit.measure(case.scenario, estimator=estimator, **REPLAYED)
            case.true(d.estimator == estimator, f"estimator is {d.estimator!r}, expected {estimator!r}")
            chi_net, stderr = _expected(case, signs, starts)
            probes = REPLAYED["max_probes"]
            if estimator == "per_sample" and _signs(case).balanced:
                (chi_net, stderr), probes = _swapped(case), 2
            case.equal(f"{estimator}: probes", d.probes, probes)
            case.equal(f"{estimator}: chi_net", d.chi_net, chi_net)
            case.equal(f"{estimator}: chi_net_stderr", d.chi_net_stderr, stderr, case.tolerance)
            expected = case.truth.factors()
            chi_pos = expected["rate"] / expected["chi_loss"] / chi_net
            case.equal(f"{estimator}: rate", d.rate, expected["rate"])
            case.equal(f"{estimator}: chi_pos", d.chi_pos, chi_pos)
            case.equal(f"{estimator}: chi_pos_stderr", d.chi_pos_stderr, chi_pos * stderr / chi_net, case.tolerance)


def auto_chooses(kit: Kit) -> None:
    """Exact for few outputs, per sample where fewer random probes are likely to do."""
    for case in kit.cases(scenarios.LAYERS, scenarios.WIDE, dtypes=1):
        samples, outputs = case.truth.shape
        for rtol, expected in (
            (0.01, "exact"),
            (0.5, "exact" if outputs <= expected_probes(samples, 0.5, 64) else "per_sample"),
        ):
            d = kit.measure(case.scenario, rtol=rtol)
            case.true(d.estimator == expected, f"estimator is {d.estimator!r} for rtol={rtol}, expected {expected!r}")


def seeds_decide(kit: Kit) -> None:
    """The same seed gives the same numbers, another one others."""
    for case in kit.cases(scenarios.MANY, dtypes=1):
        first, again, other = (
            kit.measure(case.scenario, estimator="joint", max_probes=2, seed=seed).chi_net for seed in (1, 1, 2)
        )
        case.equal("chi_net of the same seed", again, first, 0)
        case.true(float(other) != float(first), "another seed gives the same chi_net")


def interacting_samples_are_measured_jointly(kit: Kit) -> None:
    """Exact row by row; the joint estimator and a note instead of the per-sample one; never a wrong number.

    Inside a compiled function, where the values that give interaction away are not known, numbers may be nan. A backend
    whose per-sample squared norms are right all the same may use them.
    """
    for case in kit.cases(*scenarios.INTERACTING, dtypes=1):
        expected, samples, signs = case.truth.factors(), case.truth.shape[0], _drawn(case)
        d = kit.measure(case.scenario, estimator="exact")
        if not (kit.compiled and np.isnan(float(d.chi_net))):
            case.factors("exact: ", d, expected)
        d = kit.measure(case.scenario, estimator="per_sample", **REPLAYED)
        if kit.compiled and np.isnan(float(d.chi_net)):
            continue
        case.true(
            d.estimator == "per_sample" or any("joint" in note for note in d.notes),
            f"no note on the joint one: {d.notes}",
        )
        starts = list(range(samples)) if d.estimator == "per_sample" else [0]
        case.equal(f"{d.estimator}: chi_net", d.chi_net, _expected(case, signs, starts)[0])
        case.equal("rate", d.rate, expected["rate"])
        for estimator, starts in (("joint", [0]), ("grouped", list(range(samples)))):
            d = kit.measure(case.scenario, estimator=estimator, **REPLAYED)
            case.equal(f"{estimator}: chi_net", d.chi_net, _expected(case, signs, starts)[0])


def microbatches_change_nothing(kit: Kit) -> None:
    """The numbers of a batch that is measured in parts."""
    for case in kit.cases(scenarios.LAYERS, scenarios.ONE_OUTPUT, dtypes=1):
        case.factors("", kit.measure(case.scenario, microbatch=2, estimator="exact"), case.truth.factors())
        d = kit.measure(case.scenario, microbatch=2, estimator="grouped", max_probes=64, rtol=0.0)
        expected = case.truth.factors()["chi_net"]
        # deterministic for this seed; 6 standard errors of the spread that it reports itself
        case.equal("grouped: chi_net", d.chi_net, expected, 6 * float(d.chi_net_stderr) / expected + case.rounding)
        case.equal("grouped: rate", d.rate, case.truth.factors()["rate"])


ESTIMATOR_CHECKS = (
    enumerated_signs_give_trace_and_variance,
    estimators_average_their_probes,
    auto_chooses,
    seeds_decide,
    interacting_samples_are_measured_jointly,
    microbatches_change_nothing,
)


def _enumerated(kit: Kit, lin: Any, probe: trace.Probe, v: np.ndarray) -> np.ndarray:
    array = lin.xp.asarray(v, dtype=lin.outputs.dtype, device=device_of(lin.outputs))
    return np.asarray(kit.to_numpy(probe.square_norms(array)), dtype="float64")


def _drawn(case: Case) -> list[np.ndarray]:
    """The first signs that the record hands out for the seed."""
    signs = _signs(case)
    return [np.asarray(case.kit.to_numpy(signs(i)), dtype="float64") for i in range(REPLAYED["max_probes"])]


def _signs(case: Case) -> Any:
    return case.kit.record(case.scenario, seed=REPLAYED["seed"], split=False).signs


def _swapped(case: Case) -> tuple[float, float]:
    """chi_net and its standard error from the first two probes of a balanced design and the dense kernel."""
    signs, samples = _signs(case), case.truth.shape[0]
    pair, m = signs.pairs(0), signs.block
    of_both = [np.asarray(case.kit.to_numpy(v), dtype="float64") for v in (pair.first, pair.second)]
    x, y = (case.truth.block_square_norms(v, list(range(samples))) for v in of_both)
    partner, d = [int(n) for n in case.kit.to_numpy(pair.partner)], x - y
    pairs = [(n, other) for n, other in enumerate(partner) if n < other]
    residual = np.mean([(d[n] + d[other]) ** 2 / 4 for n, other in pairs]) * (m - 1) / m
    whole = np.mean([(d[n] ** 2 + d[other] ** 2) / 4 for n, other in pairs]) * (m - 1) / m
    used = (samples + samples % 2) % m
    common = used * (m - used) / (m - 1) * max(whole - residual, 0.0)
    variance = samples * residual / 2 * (m - 2) / (m - 1) + common
    return float(np.sum(x + y)) / 2 / case.truth.terms, float(variance**0.5) / case.truth.terms


def _expected(case: Case, signs: list[np.ndarray], starts: list[int]) -> tuple[float, float]:
    """chi_net and its standard error from these signs and the dense kernel, for blocks of samples."""
    values, probes = np.stack([case.truth.block_square_norms(v, starts) for v in signs]), len(signs)
    stderr = np.sum((values - values.mean(axis=0)) ** 2 / (probes * (probes - 1))) ** 0.5
    return values.sum(axis=1).mean() / case.truth.terms, float(stderr) / case.truth.terms
