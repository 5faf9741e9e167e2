"""A run that goes on from a checkpoint with another tracker than the one that it was made with."""

from __future__ import annotations

import numpy as np
import pytest

import lnp
import lnp_numpy

MODEL, BATCH = lnp_numpy.LinearModel(weight=np.ones((2, 1))), (np.eye(2), np.zeros((2, 1)))


def state_after(steps, path=None, schedule=1):
    """The state of a tracker that has measured these steps."""
    with lnp.Tracker(path, schedule) as tracker:
        for step in steps:
            tracker.observe(step, MODEL, BATCH)
        return tracker.state_dict()


def test_rows_of_a_file_are_not_those_of_a_tracker_without_one(tmp_path):
    tracker = lnp.Tracker(schedule=1)
    tracker.load_state_dict(state_after(range(2), tmp_path / "run.jsonl"))
    assert len(tracker.history) == 0


def test_rows_of_a_tracker_without_a_file_are_not_those_of_one(tmp_path):
    tracker = lnp.Tracker(tmp_path / "run.jsonl", schedule=1)
    tracker.load_state_dict(state_after(range(2)))
    assert len(tracker.history) == 0


def test_a_state_that_an_earlier_version_wrote_is_taken():
    rows = [{"step": 3, "loss": 0.5}]
    tracker = lnp.Tracker(schedule=1)
    tracker.load_state_dict({"version": 1, "observed": 4, "schedule": None, "batches": None, "rows": rows})
    assert tracker.history.rows() == rows
    assert tracker.observe(3, MODEL, BATCH) is None
    assert tracker.observe(4, MODEL, BATCH) is not None


class Remembering:
    """A schedule that has something to remember."""

    def __init__(self, known):
        self.known = known

    def __call__(self, step):
        return True

    def state_dict(self):
        return {"known": self.known}

    def load_state_dict(self, state):
        self.known = state["known"]


def test_a_schedule_goes_on_with_what_it_knows():
    schedule = Remembering("nothing")
    lnp.Tracker(schedule=schedule).load_state_dict(state_after([0], schedule=Remembering("much")))
    assert schedule.known == "much"


@pytest.mark.parametrize("other", [1, lambda step: True], ids=["steps", "function"])
def test_a_schedule_stays_as_it_is_after_one_that_knew_nothing(other):
    schedule = Remembering("nothing")
    lnp.Tracker(schedule=schedule).load_state_dict(state_after([0], schedule=other))
    assert schedule.known == "nothing"
