"""Schedules measure where they say, and cost next to nothing."""

from __future__ import annotations

import array
import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lnp.schedule import as_schedule, at, budget, every, log_windows


def steps(schedule, stop):
    return [step for step in range(stop) if schedule(step)]


def windows_by_hand(points, width, growth, last, stop):
    """Every step whose window reaches it, by going through all centres."""
    centres, index = {0, last}, 0
    while (centre := round(10 ** (index / points))) <= last + 10 * (width + 1) * (1 + growth):
        centres.add(min(centre, last))
        index += 1
        if centre >= last:
            break
    found = set()
    for centre in centres:
        size = round(width * (1 + growth * math.log10(max(centre, 1))))
        first = centre - (size - 1) // 2 if centre else 0
        found |= set(range(max(0, first), min(last, first + size - 1) + 1))
    return sorted(step for step in found if step < stop)


@given(st.integers(1, 12), st.integers(1, 6), st.floats(0, 2), st.integers(0, 800))
def test_windows_are_those_around_the_centres(points, width, growth, last):
    schedule = log_windows(points, width, growth, last)
    assert steps(schedule, last + 50) == windows_by_hand(points, width, growth, last, last + 50)


@given(st.integers(1, 12), st.integers(1, 6), st.floats(0, 2), st.lists(st.integers(0, 3000), min_size=1))
def test_the_answer_does_not_depend_on_what_was_asked_before(points, width, growth, asked):
    fresh = lambda: log_windows(points, width, growth)
    used = fresh()
    assert [used.window(step) for step in asked] == [fresh().window(step) for step in asked]


@given(st.integers(1, 10), st.integers(1, 5), st.integers(1, 3000))
def test_first_and_last_step_are_measured(points, width, last):
    schedule = log_windows(points, width, last=last)
    assert schedule(0)
    assert schedule(last)
    assert not schedule(last + 1)


def test_windows_are_cut_off_at_the_end_and_not_dropped():
    assert steps(log_windows(1, width=5, last=101), 200) == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 98, 99, 100, 101]


def test_windows_grow_with_the_logarithm_of_the_step():
    schedule = log_windows(1, width=2, growth=1.0)
    inside = [step for step in range(2000) if schedule.window(step) == 1000]
    assert len(inside) == 2 * (1 + 3)
    assert len([step for step in range(2000) if schedule.window(step) == 100]) == 2 * (1 + 2)


def test_points_are_even_in_the_logarithm():
    assert steps(log_windows(1), 10001) == [0, 1, 10, 100, 1000, 10000]
    assert len(steps(log_windows(20), 10**4)) - len(steps(log_windows(20), 10**3)) == 20


def test_other_forms():
    assert steps(every(7), 20) == [0, 7, 14]
    assert steps(at([3, 5]), 20) == [3, 5]
    assert steps(as_schedule(5), 11) == [0, 5, 10]
    assert steps(as_schedule(range(2, 4)), 11) == [2, 3]
    assert steps(as_schedule(lambda step: step == 4), 11) == [4]
    assert as_schedule(None) == log_windows(width=3)
    assert {as_schedule(None).window(step) for step in (99, 100, 101)} == {100}


def test_numbers_and_steps_of_numpy():
    assert as_schedule(np.int64(5)) == every(5)
    assert steps(as_schedule(np.array([0, 5])), 11) == [0, 5]


@pytest.mark.parametrize("given", [np.array(5), np.array([[0, 5]]), array.array("i", [0, 5])])
def test_other_arrays_are_no_schedule(given):
    with pytest.raises(TypeError, match="array"):
        as_schedule(given)


@pytest.mark.parametrize("fraction", [0, 1, 1.5, -0.1])
def test_a_budget_is_a_part_of_the_time(fraction):
    with pytest.raises(ValueError, match="fraction"):
        budget(fraction)


def test_a_budget_before_its_first_step():
    assert budget(0.1).state_dict() == {"elapsed": 0.0, "spent": 0.0, "cost": None}
    assert repr(budget(0.1)) == "budget(0.1)"
    assert repr(budget(0.1, among=at([3, 1]))) == "budget(0.1, among=at([1, 3]))"


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def spent_share(clock, schedule, cost, steps, pace=1.0):
    spent, measured = 0.0, []
    for step in range(steps):
        if schedule(step):
            clock.now += cost(step)
            schedule.measured(cost(step))
            spent += cost(step)
            measured.append(step)
        clock.now += pace
    return spent / clock.now, measured


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_budget_is_kept_and_used(fraction):
    clock = Clock()
    share, measured = spent_share(clock, budget(fraction, clock=clock), lambda step: 3.0, 5000)
    assert measured[:2] == [0, 1]
    assert 0.8 * fraction < share - 3.0 / clock.now <= fraction


def test_budget_adapts_when_measuring_gets_dearer():
    clock = Clock()
    share, measured = spent_share(clock, budget(0.05, clock=clock), lambda step: 1.0 if step < 5000 else 10.0, 20000)
    assert share < 0.051
    early, late = sum(step < 5000 for step in measured), sum(step >= 5000 for step in measured)
    assert early / 5000 > 5 * late / 15000


def test_the_cost_of_the_first_measurement_which_compiles_is_not_counted():
    schedule = budget(0.1)
    for seconds, cost, spent in ((9.0, None, 0.0), (1.0, 1.0, 1.0), (3.0, 2.0, 4.0)):
        assert schedule(0) == (cost != 2.0)
        schedule.measured(seconds)
        state = schedule.state_dict()
        assert (state["cost"], state["spent"]) == (cost, spent)


def test_budget_goes_on_after_a_restart_and_takes_only_steps_among_those_given():
    clock = Clock()
    schedule = budget(0.1, among=10, clock=clock)
    _, measured = spent_share(clock, schedule, lambda step: 1.0, 500)
    assert all(step % 10 == 0 for step in measured)
    later = Clock()
    resumed = budget(0.1, clock=later)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.state_dict() == schedule.state_dict()
    schedule.measured(100.0)
    resumed.measured(7.0)  # compiles again
    assert resumed.state_dict()["spent"] == 49.0
    resumed.load_state_dict(schedule.state_dict())
    assert not resumed(501)
    later.now += 2000
    assert resumed(502)


@pytest.mark.parametrize(
    "schedule", [every(1000), at([5000]), log_windows(8, 5, 1.0, last=10**6), budget(0.02)], ids=lambda s: repr(s)
)
def test_a_decision_is_a_few_calls(schedule):
    """However far the run is: it is asked at every step."""
    if isinstance(schedule, budget):
        schedule(0)
        schedule.measured(1e9)
        schedule.measured(1e9)
    calls = []
    for step in (17, 10**6):
        schedule(step)  # what is prepared once may take longer
        sys.setprofile(lambda frame, event, argument: calls.append(event))
        try:
            schedule(step)
        finally:
            sys.setprofile(None)
    assert len(calls) <= 150


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: every(0), "number of steps >= 1"),
        (lambda: every(1.5), "number of steps >= 1"),
        (lambda: log_windows(0), "positive number"),
        (lambda: log_windows(1, width=0), "number of steps >= 1"),
        (lambda: log_windows(1, growth=-1), "growth >= 0"),
        (lambda: log_windows(1, last=-1), "last step"),
        (lambda: log_windows(1, last=1e4), "last step"),
        (lambda: at([0, 1.5]), "Expected integers"),
        (lambda: at("12"), "Expected integers"),
        (lambda: budget(0.1, among="often"), "one of lnp.schedule"),
        (lambda: budget(2), "fraction of the run's time"),
        (lambda: as_schedule("often"), "one of lnp.schedule"),
        (lambda: as_schedule(True), "one of lnp.schedule"),
    ],
)
def test_bad_schedules_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
