"""Checks of edge cases, of errors, and that nothing the user has is changed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

import lnp
from lnp.testing import scenarios
from lnp.testing.kit import Case, Kit
from lnp.testing.oracle import Loss
from lnp.testing.scenarios import Scenario

ESTIMATORS = ("auto", "exact", "per_sample", "grouped", "joint")
CALLS = range(4)
"""At which call of the user's own function the tests let it fail."""


class Failure(RuntimeError):
    """What the user's own code raises in the tests."""


def zero_gradient_is_no_error(kit: Kit) -> None:
    """g = 0: rate and chi_loss are 0, chi_net is as ever, chi_pos is nan."""
    for case in kit.cases(scenarios.ZERO_GRADIENT):
        if case.truth.loss:
            continue  # the targets were rounded
        d = kit.measure(case.scenario, estimator="exact")
        case.equal("rate", d.rate, 0)
        case.equal("chi_loss", d.chi_loss, 0)
        case.equal("chi_net", d.chi_net, np.trace(case.truth.kernel()) / case.truth.terms)
        case.equal("chi_pos", d.chi_pos, np.nan)


def zero_jacobian_is_no_error(kit: Kit) -> None:
    """J = 0: rate and chi_net are 0, chi_loss is as ever, chi_pos is nan, and the probing ends."""
    for case in kit.cases(scenarios.ZERO_JACOBIAN, dtypes=1):
        for estimator in ESTIMATORS:
            d = kit.measure(case.scenario, estimator=estimator)
            case.equal("rate", d.rate, 0)
            case.equal("chi_net", d.chi_net, 0)
            case.equal("chi_net_stderr", d.chi_net_stderr, 0)
            case.equal("chi_loss", d.chi_loss, case.truth.terms * np.sum(case.truth.gradient**2))
            case.equal("chi_pos", d.chi_pos, np.nan)


def non_finite_values_are_passed_on(kit: Kit) -> None:
    """Outputs with nan: what they touch is nan, nothing raises, and a note says so."""
    for case in kit.cases(scenarios.NOT_FINITE, dtypes=1):
        for estimator in ESTIMATORS:
            d = kit.measure(case.scenario, estimator=estimator)
            for name in ("loss", "rate", "chi_loss", "chi_net", "chi_pos"):
                case.equal(f"{estimator}: {name}", getattr(d, name), np.nan)
            if not kit.compiled:
                case.true(any("finite" in note for note in d.notes), f"{estimator}: no note on it: {d.notes}")


def nothing_is_left_when_all_labels_are_ignored(kit: Kit) -> None:
    """No terms: the loss and chi_pos are nan, the loss gradient is 0 or nan, and nothing raises."""
    for case in kit.cases(scenarios.ALL_IGNORED, dtypes=1):
        for estimator in ESTIMATORS:
            d = kit.measure(case.scenario, estimator=estimator, max_probes=3)
            case.equal("loss_terms", d.loss_terms, 0)
            case.equal("loss", d.loss, np.nan)
            case.equal("chi_pos", d.chi_pos, np.nan)
            for name in ("rate", "chi_loss"):
                value = float(getattr(d, name))
                case.true(value == 0 or np.isnan(value), f"{name} is {value}")


def wrong_labels_are_an_error(kit: Kit) -> None:
    """A label that no output stands for; nan where an error cannot be raised."""
    for case in kit.cases(replace(scenarios.LAYERS, targets=np.array([0, 3, 1]))):
        if kit.compiled:
            case.equal("rate", kit.measure(case.scenario).rate, np.nan)
        else:
            case.raises("a label out of range", ValueError, partial(kit.measure, case.scenario))


def misuse_is_an_error(kit: Kit) -> None:
    """Shapes, losses and options that cannot be meant."""
    for case in kit.cases(scenarios.LINEAR, dtypes=1):
        for what, call in _misuses(kit, case.scenario).items():
            case.raises(what, TypeError if "pair" in what else ValueError, call)


def _misuses(kit: Kit, s: Scenario) -> dict[str, Callable[[], Any]]:
    """{what is wrong: a call that is to raise}."""
    flat = replace(s, targets=s.targets[:, 0])
    per_sample = Loss(lambda xp, f, y: xp.mean((f - y) ** 2, axis=1), lambda f, y: f - y)
    model, batch = kit.build(s)
    return {
        "a batch that is no pair": lambda: kit.decompose(model, batch[0], "mse"),
        "targets of another shape": lambda: kit.measure(flat, loss="mse"),
        "targets that tell no loss": lambda: kit.measure(flat, loss=None),
        "fewer targets than samples": lambda: kit.measure(replace(s, targets=s.targets[:2])),
        "a loss that is no scalar": lambda: kit.measure(s, loss=kit.loss(per_sample)),
        "an unknown loss": lambda: kit.measure(s, loss="mean square"),
        "an unknown estimator": lambda: kit.measure(s, estimator="best"),
        "unknown batch statistics": lambda: kit.measure(s, batch_statistics="thawed"),
    }


def no_trace_is_left(kit: Kit) -> None:
    """After every measurement the model, the batch, random state and global flags are what they were."""
    for case in kit.cases(scenarios.LAYERS, scenarios.INTERACTING[0], dtypes=1):
        for what, measure in _measurements(kit, case.scenario).items():
            if what == "microbatch" and case.scenario.interacts:
                continue
            model, batch = kit.build(case.scenario)
            before = kit.snapshot(model, batch)
            measure(model, batch)
            _unchanged(case, what, before, kit.snapshot(model, batch))


def _measurements(kit: Kit, s: Scenario) -> dict[str, Callable[[Any, Any], Any]]:
    """{name: (model, batch) -> a measurement}."""
    update = kit.update({name: np.ones_like(p) for name, p in s.parameters.items()})
    return {
        **{name: partial(kit.decompose, loss=s.loss, estimator=name, by_layer=True) for name in ESTIMATORS},
        "microbatch": partial(kit.decompose, loss=s.loss, microbatch=2, estimator="joint"),
        "cross_response": lambda m, b: lnp.cross_response(m, b, b, s.loss),
        "cross_response of two losses": lambda m, b: lnp.cross_response(m, b, b, s.loss, measured_loss=s.loss),
        "measured_loss_change": partial(lnp.measured_loss_change, loss=s.loss, update=update),
        "predicted_loss_change": partial(lnp.predicted_loss_change, loss=s.loss, learning_rate=0.1),
    }


def no_trace_is_left_by_an_error(kit: Kit) -> None:
    """The same when the user's loss or network raises, at its first call or a later one. The error passes through."""
    for case in kit.cases(scenarios.LAYERS, dtypes=1):
        for estimator, last in itertools.product(("auto", "joint"), CALLS):
            value = _failing(last, lambda xp, f, y: xp.mean(f * f))
            broken_loss = kit.loss(Loss(value, lambda f, y: 2 * f / f.size))
            _fails(kit, case.scenario, case, f"the loss failing at call {last}", last, broken_loss, estimator)
            broken = replace(case.scenario, apply=_failing(last, case.scenario.apply))
            _fails(kit, broken, case, f"the network failing at call {last}", last, broken.loss, estimator)


SAFETY_CHECKS = (
    zero_gradient_is_no_error,
    zero_jacobian_is_no_error,
    non_finite_values_are_passed_on,
    nothing_is_left_when_all_labels_are_ignored,
    wrong_labels_are_an_error,
    misuse_is_an_error,
    no_trace_is_left,
    no_trace_is_left_by_an_error,
)


def _failing(last: int, function: Callable) -> Callable:
    """The function, which raises at its call number `last`, counted from 0."""
    calls: Iterator[int] = iter(range(10**6))

    def failing(*args: Any) -> Any:
        if next(calls) == last:
            raise Failure("the user's own code failed")
        return function(*args)

    return failing


def _fails(kit: Kit, scenario: Scenario, case: Case, what: str, last: int, loss: Any, estimator: str) -> None:
    """Raise AssertionError unless the measurement fails with the user's own error, and changes nothing."""
    model, batch = kit.build(scenario)
    before = kit.snapshot(model, batch)
    raised = False
    try:
        kit.decompose(model, batch, loss, estimator=estimator)
    except Failure:
        raised = True
    _unchanged(case, f"{what}, {estimator}", before, kit.snapshot(model, batch))
    case.true(raised or last > 0, f"{what}, {estimator}: the error did not pass through")


def _unchanged(case: Case, what: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    case.true(not changed, f"{what} changed {changed}")
