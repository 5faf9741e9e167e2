"""A run that spends much of its time on measuring is told so, once, and how to spend less."""

from __future__ import annotations

import types

import pytest

import lnp
from core.failing import recorded, told, watch
from lnp.tracking.step_selection import DEAR_SECONDS

quiet = pytest.fixture(recorded)


def run_of(monkeypatch, cost, pace, steps=100):
    """A tracker of a run on a clock that measuring moves by `cost` and a step by `pace` seconds."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr("lnp.tracking.step_selection.time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    tracker = lnp.Tracker(schedule=1)
    record = tracker._selection.record_cost

    def measured(seconds):
        clock.now += cost
        record(cost)

    tracker._selection.record_cost = measured
    for step in range(steps):
        watch(tracker, [step])
        clock.now += pace
    return tracker


def test_measuring_that_takes_half_of_the_time_is_told_once(monkeypatch, quiet):
    run_of(monkeypatch, cost=1.0, pace=1.0)
    (text,) = told(quiet)
    spent = int(DEAR_SECONDS) + 1  # the first measurement beyond
    assert text.startswith(f"lnp: measuring has taken {spent} of this run's {2 * spent - 1} seconds. To measure less")


def test_measuring_that_takes_a_fifth_of_the_time_is_not(monkeypatch, quiet):
    run_of(monkeypatch, cost=1.0, pace=4.0)
    assert not quiet


@pytest.mark.parametrize(("pace", "dear"), [(2.0, True), (2.5, False)])
def test_measuring_that_takes_more_than_three_tenths_is(monkeypatch, quiet, pace, dear):
    run_of(monkeypatch, cost=1.0, pace=pace)
    assert bool(quiet) is dear


def test_measuring_that_takes_less_than_a_minute_is_not(monkeypatch, quiet):
    run_of(monkeypatch, cost=0.6, pace=0.1, steps=90)
    assert not quiet


def test_each_run_of_a_tracker_has_its_own_time(monkeypatch, quiet):
    tracker = run_of(monkeypatch, cost=1.0, pace=0.0, steps=50)
    tracker.close()
    for step in range(50, 100):
        watch(tracker, [step])
    assert not quiet
    watch(tracker, range(100, 120))
    assert len(quiet) == 1
