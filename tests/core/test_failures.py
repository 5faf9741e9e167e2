"""A failure beside a run is told once and does not end it; `on_error="raise"` raises it; the user's own pass by."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import types
import warnings

import pytest

import lnp
from core.failing import BAD, BATCH, MODEL, Torn, failing_disk, full_disk, recorded, told, watch
from lnp.schedule import budget
from lnp.tracking.failures import Failures, describe
from lnp.tracking.storage import lock

quiet = pytest.fixture(recorded)
full = pytest.fixture(full_disk)
broken = pytest.fixture(failing_disk)


# --- one reason, one warning -----------------------------------------------------------------------------------------


def test_a_measurement_that_fails_is_told_once_and_counted(quiet):
    tracker = lnp.Tracker(schedule=1)
    assert watch(tracker, [0]) == [0]
    assert watch(tracker, range(1, 5), BAD) == []
    assert watch(tracker, [5]) == [5]
    assert tracker.history["step"].tolist() == [0, 5]
    (text,) = told(quiet)
    assert text.startswith("lnp at step 1: ValueError: ")
    assert "on_error='raise'" in text
    assert quiet[0].filename == watch.__code__.co_filename  # where it was called, outside of lnp
    tracker.close()
    assert len(quiet) == 2
    assert "3 times more (steps 2 to 4): ValueError: " in told(quiet)[1]
    tracker.close()
    assert len(quiet) == 2


def test_other_reasons_are_told_too_and_numbers_make_no_other_reason(quiet):
    failures = Failures("warn")
    for step, error in enumerate(
        [MemoryError("0xab1: 3.5 of 80 GiB"), MemoryError("0xff2: 2.25 of 80 GiB"), KeyError("x")]
    ):
        with failures.catch(step, "a row"):
            raise error
    assert [text.splitlines()[0] for text in told(quiet)] == [
        "lnp at step 0: MemoryError: 0xab1: 3.5 of 80 GiB",
        "lnp at step 2: KeyError: 'x'",
    ]


def test_long_and_broken_messages(quiet):
    class Broken(Exception):
        def __str__(self):
            raise RuntimeError("no text")

    failures = Failures("warn")
    for error in (ValueError("\n".join(["line " * 30] * 50)), Broken()):
        with failures.catch(0, "a row"):
            raise error
    assert len(told(quiet)[0]) < 1000
    assert "Broken: its message cannot be read" in told(quiet)[1]
    assert describe(ValueError("one\ntwo\nthree\nfour")) == "ValueError: one\ntwo\nthree"


def test_a_filter_that_makes_errors_of_warnings_does_not_end_the_run(caplog):
    tracker = lnp.Tracker(schedule=1)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, logger="lnp"):
        warnings.simplefilter("error")
        assert watch(tracker, range(3), BAD) == []
        tracker.close()
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "lnp at step 0",
        "lnp",
    ]


def test_a_warning_that_a_filter_raises_in_a_measurement_is_a_failure_as_others(monkeypatch, caplog):
    def loss(outputs, targets):
        warnings.warn("an interface will change", FutureWarning, stacklevel=2)
        raise AssertionError("a filter raises before")

    tracker = lnp.Tracker(schedule=1)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, logger="lnp"):
        warnings.simplefilter("error")
        assert tracker.observe(0, MODEL, BATCH, options={"loss": loss}) is None
    assert "FutureWarning: an interface will change" in caplog.records[0].message


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_the_user_stops_with_is_no_failure(error):
    def loss(outputs, targets):
        raise error

    with pytest.raises(error):
        lnp.Tracker(schedule=1).observe(0, MODEL, BATCH, options={"loss": loss})


def test_raise_raises():
    tracker = lnp.Tracker(schedule=1, on_error="raise")
    with pytest.raises(ValueError, match="features have shape"):
        watch(tracker, range(3), BAD)
    assert watch(tracker, [1]) == [1]


# --- batches, schedules, files, loggers ---------------------------------------------------------------------------


def test_a_source_of_batches_that_fails_goes_on(quiet):
    tracker = lnp.Tracker(schedule=1, batch=Torn())
    samples = [d and d.samples for d in (tracker.observe(step, MODEL) for step in range(4))]
    assert samples == [4, None, 6, 7]
    assert len(quiet) == 1
    assert "cannot read a batch" in told(quiet)[0]
    state = tracker.state_dict()
    resumed = lnp.Tracker(schedule=1, batch=Torn())
    resumed.load_state_dict(state)
    assert [d and d.samples for d in (resumed.observe(step, MODEL) for step in range(4, 7))] == [None, 7, 8]


def test_a_schedule_that_fails_is_no_turn(quiet):
    tracker = lnp.Tracker(schedule=lambda step: 1 // (step - 1))
    assert tracker.due(1) is False
    assert watch(tracker, range(1, 4)) == [2]
    assert "ZeroDivisionError" in told(quiet)[0]
    with pytest.raises(ZeroDivisionError):
        watch(lnp.Tracker(schedule=lambda step: 1 // step, on_error="raise"), [0])


def test_a_failure_costs_what_it_costs(quiet):
    seconds = iter(range(10**6))
    schedule = budget(0.1, clock=lambda: next(seconds))
    tracker = lnp.Tracker(schedule=schedule)
    watch(tracker, range(20), BAD)
    assert schedule.state_dict()["cost"] > 0
    assert len(quiet) == 1


def test_what_fails_costs_the_seconds_that_it_took(monkeypatch, quiet):
    costs, now = [], iter([100.0, 103.0])
    monkeypatch.setattr("lnp.tracking.step_selection.time", types.SimpleNamespace(perf_counter=lambda: next(now)))
    schedule = lambda step: True
    schedule.measured = costs.append
    with lnp.Tracker(schedule=schedule).attempt(0):
        raise OSError("cannot prepare the batch")
    assert costs == [3.0]


def test_a_full_disk_loses_rows_and_not_the_run(full, tmp_path, quiet):
    path, seen = tmp_path / "run.jsonl", []
    tracker = lnp.Tracker(path, schedule=1, loggers=lambda values, step: seen.append(step))
    assert watch(tracker, range(3)) == [0, 1, 2]
    full.append("room")
    assert watch(tracker, range(3, 5)) == [3, 4]
    assert tracker.history["step"].tolist() == lnp.History.read(path)["step"].tolist() == [3, 4]
    assert seen == [0, 1, 2, 3, 4]
    assert len(quiet) == 1
    assert "No space left on device" in told(quiet)[0]
    tracker.close()
    assert "2 times more (steps 1 to 2)" in told(quiet)[1]


def test_what_a_row_should_have_said_is_said_by_the_next_that_is_written(full, tmp_path, quiet):
    path = tmp_path / "run.jsonl"
    full.append("room")
    with lnp.Tracker(path, schedule=1) as tracker:
        watch(tracker, range(6))
    full.clear()
    options = {"estimator": "joint", "max_probes": 2, "rtol": 0.0}
    flat = (BATCH[0], BATCH[0] @ MODEL.weight)  # the loss gradient is zero, which is noted
    with lnp.Tracker(path, schedule=1, **options) as tracker:
        assert watch(tracker, [3], flat) == [3]
        full.append("room")
        assert watch(tracker, [4], flat) == [4]
    rows = lnp.History.read(path).rows()
    assert [row["step"] for row in rows] == [0, 1, 2, 4]
    assert "zero" in rows[-1]["notes"]
    assert json.loads(path.read_text().splitlines()[-1])["resumed"] == 3


def test_a_file_that_cannot_be_opened_is_tried_again_at_due_steps(tmp_path, quiet):
    path = tmp_path / "run.jsonl"
    with lnp.Tracker(path, schedule=1) as first:
        watch(first, range(3))
    held = os.open(path, os.O_RDWR)  # a description of its own, as another process has
    lock(held)
    second = lnp.Tracker(path, schedule=[1, 3, 4, 6, 8])
    assert watch(second, range(1, 6)) == []
    assert len(quiet) == 1
    assert "another tracker" in told(quiet)[0]
    os.close(held)
    assert watch(second, range(6, 9)) == [6, 8]
    assert second.history["step"].tolist() == [0, 6, 8]  # it went on from step 1, which leaves out 1 and 2
    second.close()
    assert "2 times more (steps 3 to 4)" in told(quiet)[1]
    assert lnp.History.read(path)["step"].tolist() == [0, 6, 8]


def test_a_file_that_cannot_be_read_is_not_kept_from_others(tmp_path, quiet):
    path = tmp_path / "run.jsonl"
    path.write_text('{"comment": "no row"}\n')
    assert watch(lnp.Tracker(path, schedule=1), range(3)) == []
    assert path.read_text() == '{"comment": "no row"}\n'
    path.write_text("")  # the same file, which nobody has locked
    assert watch(lnp.Tracker(path, schedule=1), range(3)) == [0, 1, 2]


def test_a_disk_that_fails_at_the_end(broken, tmp_path, quiet):
    tracker = lnp.Tracker(tmp_path / "run.jsonl", schedule=1)
    watch(tracker, range(2))
    tracker.close()
    assert "Input/output error" in told(quiet)[0]


def test_a_logger_that_fails_gets_no_more_values(quiet):
    calls = []

    def broken(values, step):
        calls.append(step)
        raise ConnectionError("no network")

    tracker = lnp.Tracker(schedule=1, loggers=broken)
    assert watch(tracker, range(3)) == [0, 1, 2]
    assert calls == [0]
    assert len(quiet) == 1
    tracker = lnp.Tracker(schedule=1, loggers=broken, on_error="raise")
    with pytest.raises(ConnectionError):
        watch(tracker, [0])
    assert tracker.history["step"].tolist() == [0]


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_step_whose_preparation_fails_counts_as_observed(on_error, quiet):
    tracker = lnp.Tracker(schedule=1, on_error=on_error)
    for step in (7, 3):  # an earlier one leaves the later one observed
        with contextlib.suppress(ZeroDivisionError), tracker.attempt(step):
            step / 0
        assert (tracker.due(7), tracker.due(8)) == (False, True)
    assert len(quiet) == (on_error == "warn")


def test_a_process_that_does_not_measure_tells_of_no_failure_and_raises_where_that_is_wanted(quiet):
    idle = lnp.Tracker(schedule=1, rank=1)
    assert watch(idle, [0]) == []
    with idle.attempt(0):
        raise OSError("cannot prepare the batch")
    assert not quiet
    strict = lnp.Tracker(schedule=1, rank=1, on_error="raise")
    assert watch(strict, [0]) == []
    with pytest.raises(OSError, match="cannot prepare"), strict.attempt(0):
        raise OSError("cannot prepare the batch")


def test_a_row_that_the_disk_does_not_take_after_a_step_raises_unless_the_step_itself_fails(full, tmp_path, quiet):
    seen = []
    options = {"schedule": 1, "on_error": "raise", "loggers": lambda values, step: seen.append(step)}
    tracker = lnp.Tracker(tmp_path / "run.jsonl", **options)
    with pytest.raises(OSError, match="No space left"), tracker.step(0, MODEL, BATCH):
        pass
    assert (seen, len(quiet)) == ([], 0)
    with pytest.raises(FloatingPointError, match="diverged"), tracker.step(1, MODEL, BATCH):
        raise FloatingPointError("diverged")
    assert seen == [1]
    assert "No space left" in told(quiet)[0]
    assert "without the row of this step in file and history" in told(quiet)[0]


def test_values_that_are_none_are_told(tmp_path, quiet):
    tracker = lnp.Tracker(tmp_path / "run.jsonl", schedule=1)
    tracker.observe(0, MODEL, BATCH, extra=[1, 2])
    tracker.record(1, None)
    with tracker.step(2, MODEL, BATCH, extra=10**400) as watched:
        watched.after(MODEL)
    assert watch(tracker, [3]) == [3]
    assert tracker.history["step"].tolist() == [3]
    reasons = [text.split("\n")[0].split(": ")[1] for text in told(quiet)]
    assert reasons == ["TypeError", "AttributeError", "OverflowError"]


def test_a_copy_fails_as_the_original(quiet):
    copy = pickle.loads(pickle.dumps(lnp.Tracker(schedule=1)))
    assert watch(copy, range(2), BAD) == []
    assert watch(copy, [2]) == [2]
    assert len(quiet) == 1
