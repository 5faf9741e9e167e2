"""How fast the loss really falls between two measurements: exact values, the error's coverage, and what is left out."""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest

import lnp
import lnp_numpy
from core.dense import network, record
from lnp.losses.sample_losses import sample_losses_of
from lnp.runs.curves import curve
from lnp.runs.table import compare
from lnp.schedule import log_windows
from lnp.tracking.learning_rate import LearningRates, Mark
from lnp.tracking.net_rate import NOISE, NOT_AGAIN, TOO_FAST, Ends, NetRates, compared, end_of, fall, position

X, Y = np.array([[1.0], [2.0]]), np.array([[1.0], [3.0]])
NET = ("net/steps", "net/loss_fall", "net/learning_rate_sum", "net/rate", "net/chi_pos")


def model(weight):
    return lnp_numpy.LinearModel(weight=np.array([[weight]]))


def ends(step=0, parts=None, shares=None, loss=0.0, rate=0.0, scales=1.0, relative=0.0):
    return Ends(Mark(step, 0, 0.0), loss, rate, 0.0, scales, relative, parts, shares)


def run(tracker, steps, batch=None, **values):
    """A model whose weight is a tenth of the step."""
    for step in steps:
        tracker.observe(step, model(step / 10), batch, **values)
    return tracker.history.rows()


def test_values_by_hand():
    # sample losses: (0.0 - 1)^2, (0 - 3)^2 at weight 0; (0.2 - 1)^2, (0.4 - 3)^2 at weight 0.2
    first, row = run(lnp.Tracker(schedule=2, batch=(X, Y)), range(3), learning_rate=0.05)
    assert not [name for name in first if name.startswith("net/")]
    lost = np.array([1.0 - 0.8**2, 9.0 - 2.6**2])
    assert row["net/steps"] == 2
    assert row["net/learning_rate_sum"] == pytest.approx(0.1)
    assert row["net/loss_fall"] == pytest.approx(lost.mean())
    assert row["net/loss_fall_stderr"] == pytest.approx(lost.std(ddof=1) / 2**0.5)
    assert row["net/rate"] == pytest.approx(lost.mean() / 0.1)
    assert row["net/rate_stderr"] == pytest.approx(lost.std(ddof=1) / 2**0.5 / 0.1)
    scales = np.sqrt(first["chi_loss"] * first["chi_net"] * row["chi_loss"] * row["chi_net"])
    assert row["net/chi_pos"] == pytest.approx(lost.mean() / 0.1 / scales)
    assert row["net/chi_pos_stderr"] == pytest.approx(row["net/rate_stderr"] / scales)
    assert row["learning_rate"] == 0.05


def test_gradient_descent_with_small_steps_falls_at_its_rate():
    weight, rate = 0.0, 1e-3
    tracker = lnp.Tracker(schedule=20, batch=(X, Y), learning_rate=rate)
    for step in range(41):
        tracker.observe(step, model(weight))
        weight -= rate * float(np.mean(2 * X * (X * weight - Y)))
    rows = tracker.history.rows()
    for before, row in itertools.pairwise(rows):
        assert row["net/rate"] == pytest.approx((before["rate"] * row["rate"]) ** 0.5, rel=5e-3)
        assert row["net/chi_pos"] == pytest.approx((before["chi_pos"] * row["chi_pos"]) ** 0.5, rel=5e-3)
    assert "notes" not in rows[-1]


@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_of_a_fall_covers_the_truth(weighted):
    generator, covered, runs, samples = np.random.default_rng(0), [0, 0], 2000, 40
    weights = generator.integers(1, 8, samples) if weighted else np.ones(samples)
    shares = weights / weights.sum()
    errors, falls = [], []
    for _ in range(runs):
        # losses that differ far more between samples than they fall; samples of weight w are means over w labels
        before = 3 + 2 * generator.standard_normal(samples)
        after = before - 0.1 - 0.3 * generator.standard_normal(samples) / np.sqrt(weights)
        found, stderr = fall(ends(parts=shares * before, shares=shares), ends(parts=shares * after, shares=shares))
        covered = [count + (abs(found - 0.1) < sigmas * stderr) for count, sigmas in zip(covered, (1, 2), strict=True)]
        errors.append(stderr), falls.append(found)
    assert covered[0] / runs == pytest.approx(0.68, abs=0.03)
    assert covered[1] / runs == pytest.approx(0.95, abs=0.02)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(falls), rel=0.06)


def test_samples_that_all_fall_alike_leave_no_error_whatever_they_weigh():
    shares = np.array([0.5, 0.3, 0.2])
    before = ends(parts=shares * np.array([1.0, 2.0, 5.0]), shares=shares)
    after = ends(parts=shares * np.array([0.9, 1.9, 4.9]), shares=shares)
    assert fall(before, after) == pytest.approx((0.1, 0.0), abs=1e-12)
    assert math.isnan(fall(before, ends(loss=1.0))[1])


def test_the_error_of_a_position_is_that_of_the_fall_and_of_both_traces():
    found, stderr = position(2.0, 0.3, ends(scales=4.0, relative=0.1), ends(scales=16.0, relative=0.2))
    assert (found, stderr) == pytest.approx((0.25, math.hypot(0.3 / 8, 0.25 * math.hypot(0.1, 0.2) / 2)))
    assert all(map(math.isnan, position(2.0, 0.3, ends(scales=0.0), ends())))


@pytest.mark.parametrize("stderr", [0.0, 0.5])
@pytest.mark.parametrize("rate_stderr", [0.0, 0.2])
def test_bounds_of_what_a_rate_leads_to_expect(stderr, rate_stderr):
    """Ten times below the lower first-order rate, or three times above the higher one, by two errors of both."""
    low, high = (replace(ends(rate=rate), rate_stderr=rate_stderr) for rate in (20.0, 30.0))
    fast = 90 + 2 * math.hypot(stderr, 3 * rate_stderr)
    slow = 20 - 2 * math.hypot(rate_stderr, 10 * stderr)
    for pair in ((low, high), (high, low)):
        assert compared(1.001 * fast, stderr, *pair) == TOO_FAST
        assert compared(0.999 * fast, stderr, *pair) == ""
        assert compared((slow - 0.01) / 10, stderr, *pair) == NOISE
        assert compared((slow + 0.01) / 10, stderr, *pair) == ""


def test_an_end_has_what_its_decomposition_says():
    d = lnp.decompose(model(0.1), (X, Y), sample_losses=True)
    d = replace(d, chi_net=4.0, chi_net_stderr=0.5, chi_loss=3.0)
    end = end_of(Mark(0, 0, 0.0), d)
    assert (end.scales, end.relative, end.rate, end.rate_stderr) == (12.0, 0.125, d.rate, 0.0)
    assert sum(end.parts) == pytest.approx(d.loss)
    unknown = d.sample_losses._replace(parts=np.array([1.0, math.nan]))
    assert end_of(Mark(0, 0, 0.0), replace(d, sample_losses=unknown)).parts is None
    assert end_of(Mark(0, 0, 0.0), replace(d, chi_net_stderr=math.nan)).relative == 0


def test_a_learning_rate_that_is_known_is_not_read():
    rates = LearningRates(0.1)
    rates.add(0, "no number")
    assert rates.reason == ""
    assert rates.sum_since(rates.mark(0), 3) == pytest.approx(0.3)


def test_parts_of_a_loss_add_up_to_it():
    labels = np.array([0, 1, -100, 1])
    network = lnp_numpy.LinearModel(weight=np.array([[0.3, -0.2]]))
    batch = np.array([[1.0], [2.0], [3.0], [-1.0]]), labels
    d = lnp.decompose(network, batch, sample_losses=True)
    single = [lnp.decompose(network, (batch[0][[n]], labels[[n]])).loss for n in (0, 1, 3)]
    assert np.asarray(d.sample_losses.parts) == pytest.approx([single[0] / 3, single[1] / 3, 0, single[2] / 3])
    assert np.asarray(d.sample_losses.shares) == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    assert lnp.decompose(network, batch).sample_losses is None


def squared_sum(outputs, targets):
    return np.sum((outputs - targets) ** 2), 2 * (outputs - targets)


def variance(outputs, targets):
    return np.var(outputs), 2 * (outputs - outputs.mean()) / outputs.size


@pytest.mark.parametrize(
    ("losses", "loss", "parts"),
    [
        ([0.0, 0.0], 0.0, [0.0, 0.0]),
        ([-1.0, -3.0], -2.0, [-0.5, -1.5]),
        ([1.0, 3.0], 2.0 * (1 + 7e-4), [0.5, 1.5]),
        ([1.0, 3.0], 2.0 * (1 + 2e-3), [math.nan, math.nan]),
        ([1e-6, 3e-6], 1e-6, [math.nan, math.nan]),
    ],
)
def test_parts_add_up_to_a_loss_relative_to_their_size(losses, loss, parts):
    jacobian, gradient = network(samples=2)
    lin = record(jacobian, gradient, loss=np.asarray(loss), sample_losses=lambda: np.array(losses))
    assert sample_losses_of(lin).parts == pytest.approx(parts, nan_ok=True)


def test_a_sum_over_samples_has_parts_and_another_loss_has_none():
    lin = lnp.load("numpy").linearize(model(0.1), (X, Y), lnp.Options(loss=squared_sum))
    assert sample_losses_of(lin).parts == pytest.approx([0.9**2, 2.8**2])
    assert sample_losses_of(lin).shares == pytest.approx([0.5, 0.5])
    lin = lnp.load("numpy").linearize(model(0.1), (X, Y), lnp.Options(loss=variance))
    assert np.isnan(sample_losses_of(lin).parts).all()
    row = run(lnp.Tracker(schedule=1, batch=(X, Y), learning_rate=1.0, loss=variance), range(2))[-1]
    assert row["net/loss_fall"] == pytest.approx(-(0.05**2))  # outputs 0.1 and 0.2, about 0.15
    assert math.isnan(row["net/rate_stderr"])
    assert "without standard error" in row["notes"]


@pytest.mark.parametrize(
    ("source", "expected"), [(0.5, 1.0), (lambda step: 1.0 + step, 5.0), (None, None)], ids=["number", "function", "no"]
)
def test_what_tells_the_learning_rate(source, expected):
    # only every second step is observed: a number or a function knows the others
    row = run(lnp.Tracker(schedule=1, batch=(X, Y), learning_rate=source), [1, 3], other=1)[-1]
    assert row.get("net/learning_rate_sum") == expected
    assert row["net/loss_fall"] == pytest.approx(np.mean([0.9**2 - 0.7**2, 2.8**2 - 2.4**2]))
    assert ("net/rate" in row) == ("net/chi_pos" in row) == (expected is not None)
    assert ("is not known" in row.get("notes", "")) == (expected is None)


def test_a_step_that_is_passed_over_leaves_out_one_rate():
    tracker = lnp.Tracker(schedule=3, batch=(X, Y))
    rows = run(tracker, [0, 1, 3, 4, 5, 6], learning_rate=0.1)  # no word of step 2
    assert [row.get("net/learning_rate_sum") for row in rows] == [None, None, pytest.approx(0.3)]
    assert [row.get("net/steps") for row in rows] == [None, 3, 3]


def test_a_repeated_step_counts_once():
    rows = run(lnp.Tracker(schedule=2, batch=(X, Y)), [0, 0, 1, 1, 1, 2], learning_rate=0.1)
    assert rows[-1]["net/learning_rate_sum"] == pytest.approx(0.2)


def test_a_run_that_goes_back_makes_no_pair_with_what_it_has_left():
    tracker = lnp.Tracker(schedule=lambda step: step in (0, 8, 9), batch=(X, Y), learning_rate=0.1)
    rows = run(tracker, [*range(9), 5, 6, 7, 9])
    assert [row.get("net/steps") for row in rows] == [None, 9]  # not with step 8, which leads nowhere
    tracker = lnp.Tracker(schedule=lambda step: step in (0, 8, 9), batch=(X, Y))
    assert "net/rate" not in run(tracker, [*range(9), 5, 6, 7, 9], learning_rate=0.1)[-1]


def test_a_resumed_run_goes_on_with_its_sum_and_its_losses(tmp_path):
    whole = run(lnp.Tracker(schedule=4, batch=(X, Y)), range(9), learning_rate=0.1)[-1]
    with lnp.Tracker(tmp_path / "run.jsonl", schedule=4, batch=(X, Y)) as tracker:
        run(tracker, range(6), learning_rate=0.1)
        state = json.loads(json.dumps(tracker.state_dict()))
    with lnp.Tracker(tmp_path / "run.jsonl", schedule=4, batch=(X, Y)) as tracker:
        tracker.load_state_dict(state)
        resumed = run(tracker, range(6, 9), learning_rate=0.1)[-1]
    assert [resumed[name] for name in NET] == pytest.approx([whole[name] for name in NET])
    with lnp.Tracker(tmp_path / "run.jsonl", schedule=4, batch=(X, Y)) as tracker:  # without the state
        assert "net/steps" not in run(tracker, range(8, 13), learning_rate=0.1)[-2]


def test_a_batch_is_known_again_as_the_first_of_a_list():
    alone, more = (
        lnp.Tracker(schedule=1, batch=batch, learning_rate=0.1) for batch in ((X, Y), [(X, Y), (X, Y + 1), (X, Y + 2)])
    )
    run(alone, range(2))
    more.load_state_dict(json.loads(json.dumps(alone.state_dict())))
    row = run(more, [2])[-1]
    assert (row["net/steps"], row["net/loss_fall"]) == (1, pytest.approx(np.mean([0.9**2 - 0.8**2, 2.8**2 - 2.6**2])))


def test_a_fall_is_held_against_the_update_of_its_own_step_alone():
    rates = NetRates(LearningRates(0.1))
    for step in range(2):
        d = lnp.decompose(model(step / 10), (X, Y), sample_losses=True)
        rates.values(None, step, 0, d, False)
        assert bool(rates.arrived(step, 0, 1.0)) == (step == 1)
    assert rates.arrived(2, 0, 1.0) == {}  # which was not measured
    rates.go_back(0)
    assert rates.arrived(1, 0, 1.0) == {}


def test_a_run_at_rest_has_no_rate_to_be_noted():
    exact = X, 2 * X
    tracker = lnp.Tracker(schedule=1, batch=exact, learning_rate=0.1)
    for step in range(2):
        tracker.observe(step, model(2.0))
    row = tracker.history.rows()[1]
    assert (row["rate"], row["net/rate"], row["net/rate_stderr"]) == (0, 0, 0)
    assert compared(0.0, 0.0, ends(), ends()) == ""
    assert not {NOISE, TOO_FAST} & set("; ".join(r.get("notes", "") for r in tracker.history.rows()).split("; "))


def test_windows_are_compared_at_the_same_place():
    schedule = log_windows(points_per_decade=1, width=2, last=200)
    rows = run(lnp.Tracker(schedule=schedule, batch=(X, Y), learning_rate=0.1), range(201))
    windows = {}
    for row in rows:
        windows.setdefault(row["window"], []).append(row)
    for before, now in itertools.pairwise(windows.values()):
        for place, row in enumerate(now):
            assert row["step"] - row["net/steps"] == before[min(place, len(before) - 1)]["step"]
    assert max(map(len, windows.values())) > 1


def test_a_window_s_error_is_that_of_its_samples_and_of_its_steps():
    rows = [
        {"step": step, "window": 10, "net/chi_pos": value, "net/chi_pos_stderr": 0.4}
        for step, value in enumerate((1.0, 2.0, 3.0), 9)
    ]
    assert curve(lnp.History(rows), "net/chi_pos").stderr == pytest.approx([np.hypot(0.4, 1 / 3**0.5)])
    assert curve(lnp.History(rows[:1]), "net/chi_pos").stderr == pytest.approx([0.4])


def test_the_table_has_the_net_position():
    rows = [
        {"step": step, "loss": 1.0, "chi_pos": 0.5, "net/chi_pos": 0.2, "net/chi_pos_stderr": 0.05} for step in (1, 2)
    ]
    assert compare({"a": lnp.History(rows)})[0][-1] == "0.20 ± 0.05"


def test_each_batch_of_a_list_is_compared_with_itself():
    other = X, Y + 1
    rows = run(lnp.Tracker(schedule=1, batch=[(X, Y), other], learning_rate=0.1), range(4))
    assert [row.get("net/steps") for row in rows] == [None, None, 2, 2]
    assert rows[3]["net/loss_fall"] == pytest.approx(np.mean([1.9**2 - 1.7**2, 3.8**2 - 3.4**2]))


class Loader:
    def __len__(self):
        return 1

    def __iter__(self):
        yield X.copy(), Y.copy()


def test_batches_that_never_come_again_have_no_net_rate():
    rows = run(lnp.Tracker(schedule=1, batch=Loader(), learning_rate=0.1), range(2))
    assert not [name for name in rows[1] if name.startswith("net/")]
    assert NOT_AGAIN in rows[0]["notes"]


def test_the_tracker_s_own_batch_is_what_falls_where_a_run_trains_on_another():
    trained = X, Y - 2
    alone = run(lnp.Tracker(schedule=2, batch=(X, Y), learning_rate=0.1), range(3))[-1]
    both = run(lnp.Tracker(schedule=2, batch=(X, Y), learning_rate=0.1), range(3), trained)[-1]
    assert [both[name] for name in NET] == pytest.approx([alone[name] for name in NET])
    assert not [name for name in run(lnp.Tracker(schedule=1), range(3), trained)[-1] if name.startswith("net/")]


def test_a_rate_that_is_noise_and_one_that_is_another_optimizer_s_get_a_note():
    pair = ends(rate=100.0), ends(rate=50.0)
    assert compared(1.0, 1.0, *pair) == NOISE
    assert compared(1.0, 3.0, *pair) == ""  # the net rate may be 7
    assert compared(-1.0, 0.1, *pair) == NOISE
    assert compared(40.0, 1.0, *pair) == ""
    assert compared(400.0, 20.0, *pair) == TOO_FAST
    assert compared(400.0, 80.0, *pair) == ""
    # a weight that swings about the best one, and is measured where it is far from it on one side
    tracker = lnp.Tracker(schedule=2, batch=(X, Y), learning_rate=0.1)
    for step in range(5):
        tracker.observe(step, model(1.4 + 0.3 * (-1) ** step - 1e-4 * step))
    assert NOISE in tracker.history.rows()[1]["notes"]


def test_the_noise_of_steps_holds_a_rate_up_and_leaves_no_net_rate():
    """A parabola L = a + curvature (w - best)^2 / 2, at whose bottom noisy gradient descent has come to rest."""
    generator, rate, noise, best = np.random.default_rng(0), 0.1, 0.5, float((X * Y).sum() / (X * X).sum())
    curvature, weight = float(2 * (X * X).mean()), best
    tracker = lnp.Tracker(schedule=20, batch=(X, Y), learning_rate=rate)
    for step in range(6001):
        tracker.observe(step, model(weight))
        weight -= rate * (curvature * (weight - best) + noise * generator.standard_normal())
    rates, net = tracker.history["rate"], tracker.history["net/rate"][1:]
    assert np.mean(rates) == pytest.approx(rate * curvature * noise**2 / (2 - rate * curvature), rel=0.2)
    assert abs(np.mean(net)) < 0.01 * np.mean(rates)
    # the same from the second order of a single step: rate - rate/2 (g H g + tr H C) = 0
    assert np.mean(rates) * (1 - rate * curvature / 2) == pytest.approx(rate / 2 * curvature * noise**2, rel=0.2)


def test_learning_rates_that_cannot_be_are_refused_and_others_are_left_out():
    with pytest.raises(TypeError, match="learning_rate is of type str"):
        lnp.Tracker(batch=(X, Y), learning_rate="0.1")
    with pytest.raises(ValueError, match="without batch="):
        lnp.Tracker(learning_rate=0.1)
    with pytest.raises(TypeError, match="learning_rate is 'warm-up'"):
        run(lnp.Tracker(schedule=1, batch=(X, Y)), range(3), learning_rate="warm-up")
    assert "net/rate" not in run(lnp.Tracker(schedule=1, batch=(X, Y)), range(3), learning_rate=0.0)[-1]
    with pytest.warns(UserWarning, match="net rate in the row of step 1"):
        rows = run(lnp.Tracker(schedule=1, batch=(X, Y), learning_rate=lambda step: 1 / 0), range(2))
    assert "loss" in rows[1]


def test_a_loop_may_say_the_learning_rate_without_observing():
    tracker = lnp.Tracker(schedule=2, batch=(X, Y))
    for step in range(3):
        if tracker.due(step):
            tracker.observe(step, model(step / 10))
        tracker.count(step, 0.1, "it is Lion, which takes signs")
    row = tracker.history.rows()[-1]
    assert row["net/rate"] == pytest.approx(row["net/loss_fall"] / 0.2)
    assert "net/chi_pos" not in row
    assert "it is Lion" in row["notes"]


def test_a_rate_in_the_optimizer_s_own_kernel_has_a_position():
    tracker = lnp.Tracker(schedule=1, batch=(X, Y))
    for step in range(2):
        kernel = {"preconditioner": {"weight": np.full((1, 1), 0.25)}}
        tracker.observe(step, model(step / 100), options=kernel)
        tracker.count(step, 0.01 / (0.25 * 7), "it is Adam")  # as far as 0.25 times the gradient, 7, takes it
    before, row = tracker.history.rows()
    assert row["net/rate"] == pytest.approx(before["rate"], rel=0.2)
    assert row["net/chi_pos"] == pytest.approx(before["chi_pos"], rel=0.2)
    assert row["net/rate_stderr"] > 0


def test_a_step_that_is_not_due_adds_its_learning_rate_and_nothing_else():
    tracker, calls = lnp.Tracker(schedule=lambda step: step == 0, batch=(X, Y)), []
    tracker.observe(0, model(0.1), learning_rate=0.1)
    sys.setprofile(lambda frame, event, argument: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        for step in range(1, 101):
            tracker.observe(step, None, learning_rate=0.1)
    finally:
        sys.setprofile(None)
    assert len(calls) <= 7 * 100


def test_sums_of_learning_rates():
    rates = LearningRates()
    for step in range(3, 6):
        rates.add(step, 0.5)
    assert rates.sum_since(Mark(3, 3, 0.0), 6) == 1.5
    assert rates.sum_since(rates.mark(6), 6) is None
    assert rates.sum_since(Mark(2, 2, 0.0), 6) is None
