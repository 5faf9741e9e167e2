"""Net rates in rare cases: batches of one sample, small scales, learning rates that are read or cannot be had."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp.tracking.learning_rate import Mark
from lnp.tracking.net_rate import end_of, position

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
