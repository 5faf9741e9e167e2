"""Cells and scripts that run twice, and steps that count anew in each epoch."""

from __future__ import annotations

import gc
import os

import pytest

import lnp
from core.failing import BATCH, MODEL, recorded, told, watch
from lnp.tracking.storage import lock

quiet = pytest.fixture(recorded)


@pytest.fixture
def no_collector():
    gc.disable()
    yield
    gc.enable()


def run_cell(namespace, path, **options):
    """What a notebook does where a cell is run: the names of the last time are there while it runs."""
    namespace["tracker"] = tracker = lnp.Tracker(path, schedule=1, on_error="raise", **options)
    return watch(tracker, range(3))


@pytest.mark.parametrize("options", [{}, {"batch": BATCH, "learning_rate": 0.1}], ids=["plain", "net rate"])
def test_a_cell_that_runs_twice_does_not_lock_itself_out(options, no_collector, tmp_path):
    namespace = {}
    for _ in range(3):
        assert run_cell(namespace, tmp_path / "run.jsonl", **options) == [0, 1, 2]
    assert namespace["tracker"].history["step"].tolist() == [0, 1, 2]


def test_trackers_that_nobody_holds_any_longer_let_go_of_the_file(no_collector, tmp_path):
    tracker = lnp.Tracker(tmp_path / "run.jsonl", schedule=1, on_error="raise")
    tracker.itself = tracker  # only the collector finds out
    watch(tracker, [0])
    del tracker
    assert watch(lnp.Tracker(tmp_path / "run.jsonl", schedule=1, on_error="raise"), [0, 1]) == [0, 1]


def test_a_file_that_another_process_uses_says_how_to_close_it_and_is_another_run(tmp_path):
    watch(lnp.Tracker(tmp_path / "run.jsonl", schedule=1), [0])
    file = os.open(tmp_path / "run.jsonl", os.O_RDWR)  # a description of its own, as another process has
    lock(file)
    tracker = lnp.Tracker(tmp_path / "run.jsonl", schedule=1, on_error="raise")
    assert len(tracker.history) == 1
    with pytest.raises(BlockingIOError, match=r"tracker.close\(\) or `with lnp.Tracker.*another path"):
        tracker.observe(0, MODEL, BATCH)
    assert len(tracker.history) == 0
    os.close(file)
    assert watch(tracker, [1]) == [1]
    assert tracker.history["step"].tolist() == [1]  # the other run's are left out


def test_a_cell_that_is_run_again_has_its_own_rows(tmp_path, quiet):
    """Also where the notebook keeps the first run's tracker, as it keeps what a cell returns."""
    kept = [lnp.Tracker(tmp_path / "run.jsonl", schedule=1) for _ in range(2)]
    watch(kept[0], range(5))
    assert watch(kept[1], range(2)) == [0, 1]
    assert kept[1].history["step"].tolist() == [0, 1]
    taken, replaced = told(quiet)
    assert "run.jsonl was still open in an earlier tracker of this process" in taken
    assert "holds an earlier run, measured up to step 4. This run begins with step 0" in replaced
    watch(kept[0], [5])
    assert "a later tracker of this process writes to" in told(quiet)[2]
    assert lnp.History.read(tmp_path / "run.jsonl")["step"].tolist() == [0, 1]


def test_a_run_that_goes_on_from_a_checkpoint_takes_no_other_s_place(tmp_path, quiet):
    with lnp.Tracker(tmp_path / "run.jsonl", schedule=1) as tracker:
        watch(tracker, range(5))
    assert watch(lnp.Tracker(tmp_path / "run.jsonl", schedule=1), [3, 4]) == [3, 4]
    assert not quiet


def test_steps_that_count_anew_in_each_epoch_are_told_of_once(quiet):
    tracker = lnp.Tracker(schedule=1)
    for _ in range(3):
        assert watch(tracker, range(3)) == [0, 1, 2]
    (text,) = told(quiet)
    assert "step 0 comes again after step 2" in text
    assert "step = epoch * len(loader) + i" in text


def test_going_back_to_a_checkpoint_is_no_new_epoch(quiet):
    tracker = lnp.Tracker(schedule=1)
    watch(tracker, range(3))
    state = tracker.state_dict()
    watch(tracker, range(3, 6))
    watch(tracker, range(4, 6))  # back, and not to the beginning
    tracker.load_state_dict(state)
    assert watch(tracker, range(3, 6)) == [3, 4, 5]
    tracker.load_state_dict(state | {"observed": 0})
    watch(tracker, range(3))
    assert not quiet


def test_a_process_that_does_not_measure_says_nothing(quiet):
    tracker = lnp.Tracker(schedule=1, rank=1)
    for _ in range(2):
        watch(tracker, range(3))
    assert not quiet


def test_a_process_that_does_not_measure_has_no_step_that_is_due():
    assert lnp.Tracker(schedule=1, rank=0).due(0)
    assert not lnp.Tracker(schedule=1, rank=1).due(0)
