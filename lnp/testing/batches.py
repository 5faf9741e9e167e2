"""Checks of what is measured on several batches, or on parts of one, against dense matrices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

import lnp
from lnp.arguments import LossName
from lnp.testing import scenarios
from lnp.testing.kit import FACTORS, Kit
from lnp.testing.numbers import three_times_mse
from lnp.testing.oracle import Truth
from lnp.testing.scenarios import Scenario

STEP = 1e-4
"""Length of the step of a finite difference, in float64."""


def nested_batches_are_their_own_decompositions(kit: Kit) -> None:
    """Each size is the first samples alone, also where samples hold different numbers of labels, or interact."""
    for scenario, sizes in ((scenarios.PADDED, (3, 4)), (scenarios.INTERACTING[0], (2, 3))):
        (case,) = kit.cases(scenario, dtypes=1)
        model, batch = kit.build(case.scenario)
        population = None if scenario.interacts else True
        nested = lnp.decompose_nested(
            model, batch, scenario.loss, batch_sizes=sizes, estimator="exact", population=population
        )
        case.true(nested.batch_sizes == sizes, f"the sizes are {nested.batch_sizes}, expected {sizes}")
        for size, d in zip(sizes, nested.decompositions, strict=True):
            truth = Truth(_part(case.scenario, slice(0, size)))
            case.equal(f"loss of {size} samples", d.loss, truth.loss)
            case.factors(f"{size} samples: ", d, truth.factors())
            case.true(scenario.interacts or d.population is not None, f"{size} samples tell no population: {d.notes}")
        if not scenario.interacts:
            largest = nested.decompositions[-1]
            case.equal("the position expected of the whole", nested.expected_chi_pos(sizes[-1]), largest.chi_pos)


def gradient_gram_is_the_dense_one(kit: Kit) -> None:
    """<grad L_a, grad L_b> of batches and of single samples; the diagonal has the rates."""
    for case in kit.cases(scenarios.LAYERS, dtypes=1):
        model, batch = kit.build(case.scenario)
        other = _other(case.scenario)
        truths = case.truth, Truth(other)
        gram = lnp.gradient_gram(model, [batch, kit.build(other)[1]], case.scenario.loss)
        gradients = np.stack([_gradient(truth) for truth in truths])
        expected = gradients @ gradients.T
        case.equal("matrix", gram.matrix, expected)
        case.equal("losses", gram.losses, [truth.loss for truth in truths])
        case.equal("rates", gram.rates, [truth.factors()["rate"] for truth in truths])
        norms = np.linalg.norm(gradients, axis=1)
        case.equal("cosines", gram.cosines, expected / np.outer(norms, norms))
        case.equal("population_rate", gram.population_rate, expected[0, 1])
    (case,) = kit.cases(scenarios.LINEAR, dtypes=1)
    model, batch = kit.build(case.scenario)
    gram = lnp.gradient_gram(model, batch, case.scenario.loss, groups=3)
    single = np.stack([_gradient(Truth(_part(case.scenario, slice(n, n + 1)))) for n in range(3)])
    case.equal("matrix of single samples", gram.matrix, single @ single.T)


def cross_response_takes_two_losses(kit: Kit) -> None:
    """-dL_m/dt under a step on L_t, against a finite difference, with geometric means of the factors."""
    pairs: tuple[tuple[Scenario, LossName], ...] = (scenarios.LINEAR, "huber"), (scenarios.INDEPENDENT[3], "mse")
    for scenario, measured in pairs:
        (case,) = kit.cases(scenario, dtypes=1)
        model, batch = kit.build(case.scenario)
        other = replace(case.scenario, inputs=case.scenario.inputs[::-1] * 2, loss=measured)
        t, m = case.truth, Truth(other)
        r = lnp.cross_response(
            model, batch, kit.build(other)[1], scenario.loss, measured_loss=measured, estimator="exact"
        )
        step = {name: STEP * part for name, part in t.pulled(t.gradient).items()}
        back = {name: -part for name, part in step.items()}
        falls = (m.loss_at(m.moved(step)) - m.loss_at(m.moved(back))) / (2 * STEP)
        case.equal("the rate, by a finite difference", r.rate, falls, 1e-5)
        rate = float(_gradient(t) @ _gradient(m))
        means = {name: (t.factors()[name] * m.factors(terms=r.measured.loss_terms)[name]) ** 0.5 for name in FACTORS}
        position = rate / means["chi_loss"] / means["chi_net"]
        case.factors("", r, {**means, "rate": rate, "chi_pos": position})
        case.factors("trained: ", r.trained, t.factors())
        case.equal("the measured rate", r.measured.rate, m.factors()["rate"])
    (case,) = kit.cases(scenarios.LINEAR, dtypes=1)
    model, batch = kit.build(case.scenario)
    r = lnp.cross_response(model, batch, batch, "mse", measured_loss=kit.loss(three_times_mse))
    case.equal("the rate of three times the loss", r.rate, 3 * case.truth.factors()["rate"])
    case.equal("its position", r.chi_pos, case.truth.factors()["chi_pos"])


def _part(scenario: Scenario, rows: slice) -> Scenario:
    """The scenario with some of its samples."""
    return replace(scenario, inputs=scenario.inputs[rows], targets=scenario.targets[rows])


def _other(scenario: Scenario) -> Scenario:
    """The scenario with another batch of as many samples."""
    return replace(scenario, inputs=scenario.inputs[::-1] * 2, targets=scenario.targets[:1].repeat(3, 0))


def _gradient(truth: Truth) -> np.ndarray:
    """grad L, flat."""
    return np.concatenate([part.ravel() for part in truth.pulled(truth.gradient).values()])


BATCH_CHECKS = (
    nested_batches_are_their_own_decompositions,
    gradient_gram_is_the_dense_one,
    cross_response_takes_two_losses,
)
