"""Net rates in rare cases: batches of one sample, small scales, learning rates that are read or cannot be had."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp.tracking.learning_rate import LearningRates, Mark
from lnp.tracking.net_rate import NetRates, end_of, per_predicted, position

X, Y = np.array([[1.0], [2.0]]), np.array([[1.0], [3.0]])


def model(weight):
    return lnp_numpy.LinearModel(weight=np.array([[weight]]))


def test_the_fall_on_one_sample_has_no_error():
    tracker = lnp.Tracker(schedule=1, batch=(X[:1], Y[:1]), learning_rate=0.1, on_error="raise")
    for step in range(2):
        tracker.observe(step, model(step / 10))
    row = tracker.history.rows()[1]
    assert row["net/loss_fall"] == pytest.approx(1 - 0.9**2)
    assert math.isnan(row["net/loss_fall_stderr"])


def test_scales_below_one_are_kept():
    d = replace(lnp.decompose(model(0.1), (X, Y)), chi_loss=0.5, chi_net=0.25)
    end = end_of(Mark(0, 0, 0.0), d)
    assert end.scales == 0.125
    assert position(0.5, 0.25, end, end) == pytest.approx((4.0, 2.0))


def ends(*steps):
    d = lnp.decompose(model(0.1), (X, Y), sample_losses=True)
    return [end_of(Mark(step, 0, 0.0), d) for step in steps]


def test_updates_that_promise_nothing_have_no_share_that_arrives():
    found = per_predicted(*ends(0, 4), [0.0, 0.0], [0.0])
    assert found == {"net/predicted_fall": 0.0, "net/predicted_fall_stderr": 0.0}


def test_there_is_no_rate_between_a_step_and_itself():
    rates = NetRates(LearningRates(0.1))
    d = lnp.decompose(model(0.1), (X, Y), sample_losses=True)
    assert [bool(rates.values(window, 5, "a", d, False)[0]) for window in (None, 4, 6)] == [False, False, False]
    assert rates.values(None, 9, "a", d, False)[0]["net/loss_fall"] == 0


@pytest.mark.parametrize("back", [0, 1, 2, 9, 10, 11, 12])
@pytest.mark.parametrize("kept", [False, True])
def test_a_run_that_goes_back_measures_what_it_did_before(back, kept):
    """Two windows of three steps, also where what was seen comes from a checkpoint."""
    windows = {0: 0, 1: 0, 2: 0, 9: 10, 10: 10, 11: 10}
    measured = {step: lnp.decompose(model(step / 10), (X, Y), sample_losses=True) for step in windows}

    def falls(rates, first):
        made = {
            step: rates.values(window, step, "a", measured[step], False)[0]
            for step, window in windows.items()
            if step >= first
        }
        return {step: columns.get("net/loss_fall") for step, columns in made.items()}

    rates = NetRates(LearningRates(0.1))
    expected = falls(rates, 0)
    losses = {step: d.loss for step, d in measured.items()}
    assert expected == {0: None, 1: None, 2: None} | {
        step: pytest.approx(losses[step - 9] - losses[step]) for step in (9, 10, 11)
    }
    if kept:
        rates, state = NetRates(LearningRates(0.1)), rates.state_dict()
        rates.load_state_dict(state)
    rates.go_back(back)
    assert falls(rates, back) == {step: fall for step, fall in expected.items() if step >= back}


def test_an_optimizer_is_read_at_every_step(monkeypatch):
    class Optimizer:
        param_groups, rate = (), 0.0

    monkeypatch.setattr("lnp.tracking.learning_rate._step_size", lambda: lambda optimizer: (optimizer.rate, ""))
    optimizer = Optimizer()
    tracker = lnp.Tracker(schedule=4, batch=(X, Y), learning_rate=optimizer)
    for step in range(5):
        optimizer.rate = 0.1 * (step + 1)
        tracker.observe(step, model(step / 10))
    assert tracker.history["net/learning_rate_sum"][1] == pytest.approx(0.1 + 0.2 + 0.3 + 0.4)


def test_a_learning_rate_that_fails_raises_where_that_is_wanted():
    tracker = lnp.Tracker(schedule=1, batch=(X, Y), learning_rate=lambda step: 1 / 0, on_error="raise")
    tracker.observe(0, model(0.0))
    with pytest.raises(ZeroDivisionError):
        tracker.observe(1, model(0.1))


def test_losses_of_samples_that_are_a_list_are_taken_too():
    d = replace(lnp.decompose(model(0.1), (X, Y)), sample_losses=([1.0, 2.0], [0.5, 0.5]))
    assert (end_of(Mark(0, 0, 0.0), d).parts, end_of(Mark(0, 0, 0.0), d).shares) == ([1.0, 2.0], [0.5, 0.5])
