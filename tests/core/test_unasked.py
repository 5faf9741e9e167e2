"""Options that are left out have the values that the documentation gives them."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import lnp
import lnp_numpy
from core.dense import drawn, network, record
from lnp import typed_options
from lnp.contract.gradient_pass import gradient_pass
from lnp.contract.linearization import GradientPass
from lnp.contract.options import Options
from lnp.demo import Settings
from lnp.estimators.population import why_none
from lnp.runs.curves import reach
from lnp.runs.power_law import bootstrap
from lnp.schedule import log_windows
from lnp_numpy.backend import linearize

RNG = np.random.default_rng(0)
SHAPE = (10, 4)
TARGETS, OTHERS = RNG.normal(size=(2, *SHAPE))
PROBED = {"estimator": "auto", "rtol": 0.01, "max_probes": 64}
LINEAR = lnp_numpy.LinearModel(weight=RNG.normal(size=(5, 3)))
BATCH = (RNG.normal(size=(12, 5)), RNG.integers(0, 3, 12))
WIDTHS = pytest.mark.parametrize("parameters", [900, 40])  # with which probes reach an error of 1%, and do not


def model(parameters):
    return lnp_numpy.OperatorModel(np.zeros(SHAPE), np.random.default_rng(1).normal(size=(40, parameters)))


@WIDTHS
def test_a_decomposition_is_to_one_percent_of_64_probes_at_most(parameters):
    batch = (None, TARGETS)
    found = lnp.decompose(model(parameters), batch)
    assert found == lnp.decompose(model(parameters), batch, **PROBED, seed=0, by_layer=False)
    assert found.layers is None


@WIDTHS
def test_a_cross_response_is_as_precise(parameters):
    batches = (None, TARGETS), (None, OTHERS)
    found = lnp.cross_response(model(parameters), *batches)
    assert found == lnp.cross_response(model(parameters), *batches, **PROBED, seed=0, by_layer=False)


def test_neither_has_more_than_the_factors():
    assert lnp.decompose(LINEAR, BATCH).sample_losses is None
    found = lnp.cross_response(LINEAR, BATCH, BATCH)
    for d in (found.trained, found.measured):
        assert (d.layers, d.population, d.sample_losses) == (None, None, None)


@WIDTHS
def test_a_spectrum_has_32_nodes_and_no_density(parameters):
    found = lnp.spectrum(model(parameters), (None, TARGETS))
    told = lnp.spectrum(model(parameters), (None, TARGETS), **PROBED, steps=32, probes=0, seed=0)
    assert (found.eigenvalues.size, found.density) == (32, None)
    assert (found.decomposition, found.eigenvalues.tolist()) == (told.decomposition, told.eigenvalues.tolist())


@pytest.mark.parametrize("estimator", [lnp.hutch_plus_plus, lnp.xtrace])
def test_a_trace_is_of_60_products(estimator):
    matrix = np.diag(0.99 ** np.arange(200)) + 0.01
    assert estimator(matrix) == estimator(matrix, 60, seed=0)
    assert estimator(matrix).stderr > 0


def test_a_bootstrap_has_a_thousand_draws():
    given = [1.0, 10.0], RNG.uniform(1, 2, size=(2, 9))
    assert bootstrap(*given) == bootstrap(*given, draws=1000, level=0.68, seed=0)


def test_a_reach_is_over_five_windows_of_five():
    values = 1 / (1 + np.arange(40.0)) * RNG.uniform(0.5, 2, 40)
    history = lnp.History([{"step": step, "chi_pos": value} for step, value in enumerate(values)])
    expected = lnp.reach(np.arange(40), values, window=5, size=5)
    assert reach(history) == history.reach() == expected
    last = lnp.reach(np.arange(40), values, window="last", size=5)
    assert reach(history, window="last") == history.reach(window="last") == last


def test_windows_are_eight_for_each_factor_of_ten():
    schedule, fresh = log_windows(), log_windows(8.0, 1, 0.0)
    assert [step for step in range(200) if schedule(step)] == [step for step in range(200) if fresh(step)]
    assert schedule == log_windows()  # what it has found so far is no part of it
    assert [*inspect.signature(log_windows).parameters] == ["points_per_decade", "width", "growth", "last"]


def test_the_demo_is_the_one_of_the_readme():
    """Digits learnt by networks of three widths, and by one with frozen features; 300 steps; three seeds."""
    expected = {"widths": (16, 64, 256), "frozen": 64, "steps": 300, "seeds": 3}
    assert Settings() == Settings(**expected, batch=256, learning_rate=0.1, measured=1024, points=20)


@pytest.mark.parametrize("name", ["Measure", "Loss", "Decompose", "Watch", "Tracker"])
def test_every_option_may_be_left_out(name):
    assert getattr(typed_options, f"{name}Options").__required_keys__ == frozenset()


def test_a_model_is_linearised_with_single_samples_and_the_first_seed():
    lin, first, second = (
        linearize(LINEAR, BATCH, options) for options in (Options(), Options(seed=0), Options(seed=1))
    )
    assert lin.sample_square_norms is not None
    assert np.array_equal(lin.signs(0), first.signs(0))
    assert not np.array_equal(lin.signs(0), second.signs(0))


def test_a_backward_pass_yields_squared_norms_alone():
    asked, (jacobian, gradient) = [], network()
    lin = record(jacobian, gradient, subset=drawn(jacobian))
    found = gradient_pass(lin)
    assert (found.sample_square_norms, found.products) == (None, None)
    passes = lambda *wish: asked.append(wish) or GradientPass(found.square_norms)
    gradient_pass(record(jacobian, gradient, gradient_pass=passes))
    assert asked == [(False, 0, False)]


def test_a_record_is_one_group_of_a_loss_that_may_be_no_mean():
    lin = record(*network())
    assert lin.groups == 1
    assert why_none(lin, True, True).startswith("it is not known whether the loss is a mean over samples")


@pytest.mark.parametrize(("cost", "cheap"), [(2.0, True), (2.1, False)])
def test_single_samples_are_cheap_up_to_two_passes(cost, cheap):
    assert record(*network(), sample_cost=cost).cheap is cheap
