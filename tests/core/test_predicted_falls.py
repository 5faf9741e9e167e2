"""How much of what updates promise arrives, for any optimizer: exact values, coverage, and what is left out."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp.schedule import log_windows
from lnp.tracking.learning_rate import Mark
from lnp.tracking.net_rate import Ends, per_predicted

X, Y = np.array([[1.0], [2.0]]), np.array([[1.0], [3.0]])
BEST, CURVATURE = 1.4, 5.0
ARRIVED = ("net/predicted_fall", "net/predicted_fall_stderr", "net/per_predicted", "net/per_predicted_stderr")


def model(weight):
    return lnp_numpy.LinearModel(weight=np.array([[weight]]))


def slope(weight, inputs=X, targets=Y):
    return float(np.mean(2 * inputs * (inputs * weight - targets)))


def train(tracker, steps, update, weight=0.0, batch=None):
    """`update(weight, step)` is what each step adds to the weight."""
    weights = [weight]
    for step in range(steps):
        with tracker.step(step, model(weight), batch) as watched:
            weight += update(weight, step)
            watched.after(model(weight))
        weights.append(weight)
    return tracker.history.rows(), weights


def ends(step, loss, predicted=None):
    return Ends(Mark(step, 0, 0.0), loss, 0.0, 0.0, 1.0, 0.0, None, None, predicted)


def test_values_by_hand():
    rows, weights = train(lnp.Tracker(schedule=2, batch=(X, Y)), 3, lambda weight, step: 0.05 + 0.01 * step)
    first, row = rows
    assert not set(ARRIVED) & set(first)
    predicted = [-slope(weights[0]) * 0.05, -slope(weights[2]) * 0.07]
    assert row["net/predicted_fall"] == pytest.approx(2 * np.mean(predicted))
    assert row["net/predicted_fall_stderr"] == pytest.approx(2 * np.std(predicted, ddof=1) / 2**0.5)
    share = row["net/loss_fall"] / row["net/predicted_fall"]
    assert row["net/per_predicted"] == pytest.approx(share)
    relative = np.hypot(row["net/loss_fall_stderr"] / share, row["net/predicted_fall_stderr"])
    assert row["net/per_predicted_stderr"] == pytest.approx(share * relative / row["net/predicted_fall"])


@pytest.mark.parametrize(
    "update",
    [lambda weight, step: -1e-3 * slope(weight), lambda weight, step: -1e-3 * np.sign(slope(weight))],
    ids=["gradient descent", "signs"],
)
def test_small_steps_of_any_optimizer_keep_what_they_promise(update):
    rows, _ = train(lnp.Tracker(schedule=20, batch=(X, Y)), 61, update)
    assert [row["net/per_predicted"] for row in rows[1:]] == pytest.approx([1.0] * 3, rel=5e-3)


def test_a_tracker_that_sees_the_training_batch_promises_for_its_own():
    def update(weight, step):
        return 0.01

    alone, _ = train(lnp.Tracker(schedule=1, batch=(X, Y)), 3, update)
    trained = X, Y - 2
    both, weights = train(lnp.Tracker(schedule=1, batch=(X, Y)), 3, update, batch=trained)
    assert [both[-1][name] for name in ARRIVED] == pytest.approx([alone[-1][name] for name in ARRIVED])
    assert both[-1]["update/predicted"] == pytest.approx(0.01 * slope(weights[2], *trained))
    assert not set(ARRIVED) & set(train(lnp.Tracker(schedule=1), 3, update, batch=trained)[0][-1])


def test_what_noise_promises_at_rest_does_not_arrive():
    generator, rate = np.random.default_rng(0), 0.1

    def update(weight, step):
        return -rate * (slope(weight) + 0.5 * generator.standard_normal())

    rows, _ = train(lnp.Tracker(schedule=20, batch=(X, Y)), 6001, update, weight=BEST)
    predicted = np.mean([row["net/predicted_fall"] for row in rows[1:]]) / 20
    assert predicted == pytest.approx(rate * rate * CURVATURE * 0.5**2 / (2 - rate * CURVATURE), rel=0.2)
    assert abs(np.mean([row["net/loss_fall"] for row in rows[1:]]) / 20) < 0.01 * predicted


def test_the_error_of_a_promise_covers_the_truth_and_an_unclear_one_divides_nothing():
    generator, covered, shown, runs = np.random.default_rng(0), [0, 0], 0, 4000
    for _ in range(runs):
        start, end = 2 + generator.standard_normal(6), 2 + generator.standard_normal(6)
        found = per_predicted(ends(0, 9.0), ends(5, 4.0), start.tolist(), end.tolist())
        away = abs(found["net/predicted_fall"] - 10) / found["net/predicted_fall_stderr"]
        covered = [count + (away < sigmas) for count, sigmas in zip(covered, (1, 2), strict=True)]
        shown += "net/per_predicted" in found
    assert covered[0] / runs == pytest.approx(0.66, abs=0.03)  # Student's t with 11 degrees of freedom
    assert covered[1] / runs == pytest.approx(0.93, abs=0.02)
    assert shown > 0.98 * runs
    unclear = per_predicted(ends(0, 9.0), ends(5, 4.0), [3.0, -1.0], [2.0, -1.0])
    assert set(unclear) == {"net/predicted_fall", "net/predicted_fall_stderr"}
    assert per_predicted(ends(0, 9.0), ends(5, 4.0), [], [1.0]) == {}


def test_windows_average_their_promises():
    schedule = log_windows(points_per_decade=1, width=3, last=30)
    rows, _ = train(lnp.Tracker(schedule=schedule, batch=(X, Y)), 31, lambda weight, step: 1e-3 * (1 + step % 2))
    windows = {}
    for row in rows:
        windows.setdefault(row["window"], []).append(-row["update/predicted"])
    *_, before, now = windows.values()
    assert (len(before), len(now)) == (3, 2)
    steps = rows[-1]["net/steps"]
    assert rows[-1]["net/predicted_fall"] == pytest.approx(steps * (np.mean(before) + np.mean(now)) / 2)
    assert rows[-1]["net/predicted_fall_stderr"] == pytest.approx(steps * np.std([*before, *now], ddof=1) / 5**0.5)


def test_a_resumed_run_goes_on_with_its_promises():
    tracker = lnp.Tracker(schedule=2, batch=(X, Y))
    whole, _ = train(tracker, 3, lambda weight, step: 0.01)
    first = lnp.Tracker(schedule=2, batch=(X, Y))
    _, weights = train(first, 2, lambda weight, step: 0.01)
    resumed = lnp.Tracker(schedule=2, batch=(X, Y))
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    with resumed.step(2, model(weights[-1])) as watched:
        watched.after(model(weights[-1] + 0.01))
    assert [resumed.history.rows()[-1][name] for name in ARRIVED] == pytest.approx(
        [whole[-1][name] for name in ARRIVED]
    )
    assert math.isfinite(whole[-1]["net/per_predicted"])
