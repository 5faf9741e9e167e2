"""A failure beside a run is told once and does not end it; `on_error="raise"` raises it; the user's own pass by."""

from __future__ import annotations

import errno
import json
import logging
import pickle
import warnings

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp.failures import Failures
from lnp.schedule import budget
from lnp.storage import Appender

GENERATOR = np.random.default_rng(0)
MODEL = lnp_numpy.LinearModel(weight=GENERATOR.standard_normal((3, 2)))
BATCH = (GENERATOR.standard_normal((8, 3)), GENERATOR.standard_normal((8, 2)))
BAD = (GENERATOR.standard_normal((8, 5)), GENERATOR.standard_normal((8, 2)))
"""A batch that the model cannot take."""


def watch(tracker, steps, batch=BATCH):
    return [step for step in steps if tracker.observe(step, MODEL, batch) is not None]


def told(caught):
    return [str(warning.message) for warning in caught]


@pytest.fixture
def quiet():
    """What is warned of inside."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


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
    assert quiet[0].filename == __file__
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
        with failures.caught(step, "a row"):
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
        with failures.caught(0, "a row"):
            raise error
    assert len(told(quiet)[0]) < 1000
    assert "Broken: its message cannot be read" in told(quiet)[1]


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


class Torn:
    """A loader one of whose batches cannot be read."""

    def __iter__(self):
        return Torn.Batches()

    class Batches:
        def __init__(self):
            self.count = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.count += 1
            if self.count == 2:
                raise OSError("cannot read a batch")
            return (BATCH[0][: self.count + 3], BATCH[1][: self.count + 3])


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


@pytest.fixture
def full(monkeypatch):
    """A disk that is full while the list is empty."""
    room, append = [], Appender.append

    def where_room_is(self, record):
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, record)

    monkeypatch.setattr(Appender, "append", where_room_is)
    return room


@pytest.fixture
def failing_disk(monkeypatch):
    """A disk that fails when a file is closed."""
    close = Appender.close

    def closed(self):
        close(self)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Appender, "close", closed)


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
    first = lnp.Tracker(path, schedule=1)
    watch(first, range(3))
    second = lnp.Tracker(path, schedule=2)
    assert watch(second, range(1, 6)) == []
    assert len(quiet) == 1
    assert "another tracker" in told(quiet)[0]
    first.close()
    assert watch(second, range(6, 9)) == [6, 8]
    assert second.history["step"].tolist() == [0, 6, 8]  # it went on from step 1, which leaves out 1 and 2
    second.close()
    assert lnp.History.read(path)["step"].tolist() == [0, 6, 8]


def test_a_file_that_cannot_be_read_is_not_kept_from_others(tmp_path, quiet):
    path = tmp_path / "run.jsonl"
    path.write_text('{"comment": "no row"}\n')
    assert watch(lnp.Tracker(path, schedule=1), range(3)) == []
    assert path.read_text() == '{"comment": "no row"}\n'
    path.unlink()
    assert watch(lnp.Tracker(path, schedule=1), range(3)) == [0, 1, 2]


def test_a_disk_that_fails_at_the_end(failing_disk, tmp_path, quiet):
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


def test_values_that_are_none_are_told(tmp_path, quiet):
    tracker = lnp.Tracker(tmp_path / "run.jsonl", schedule=1)
    tracker.observe(0, MODEL, BATCH, extra=[1, 2])
    tracker.record(1, None)
    assert watch(tracker, [2]) == [2]
    assert tracker.history["step"].tolist() == [2]
    assert [text.split("\n")[0].split(": ")[1] for text in told(quiet)] == ["TypeError", "AttributeError"]


def test_a_copy_fails_as_the_original(quiet):
    copy = pickle.loads(pickle.dumps(lnp.Tracker(schedule=1)))
    assert watch(copy, range(2), BAD) == []
    assert watch(copy, [2]) == [2]
    assert len(quiet) == 1


# --- updates ------------------------------------------------------------------------------------------------------


def test_before_an_update(monkeypatch, quiet):
    def broken(model):
        raise MemoryError("no room for a copy")

    monkeypatch.setattr(lnp_numpy, "snapshot", broken)
    ran, tracker = [], lnp.Tracker(schedule=1)
    with tracker.step(0, MODEL, BATCH) as watched:
        ran.append(watched.decomposition)
    assert ran == [None]
    assert len(tracker.history) == 0
    assert "no room for a copy" in told(quiet)[0]
    with pytest.raises(MemoryError), lnp.Tracker(schedule=1, on_error="raise").step(0, MODEL, BATCH):
        ran.append("not reached")
    assert ran == [None]


def test_after_an_update(monkeypatch, quiet):
    def broken(before, after):
        raise MemoryError("no room for a difference")

    monkeypatch.setattr(lnp_numpy, "difference", broken)
    tracker = lnp.Tracker(schedule=1)
    with tracker.step(0, MODEL, BATCH) as watched:
        assert watched.decomposition is not None
    assert tracker.history["step"].tolist() == [0]
    assert "update/measured" not in tracker.history
    assert "without update/predicted and update/measured" in told(quiet)[0]
    tracker = lnp.Tracker(schedule=1, on_error="raise")
    with pytest.raises(MemoryError), tracker.step(0, MODEL, BATCH):
        pass
    assert tracker.history["step"].tolist() == [0]


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_the_users_own_error_passes_through_also_when_the_row_cannot_be_written(full, on_error, tmp_path, quiet):
    tracker = lnp.Tracker(tmp_path / "run.jsonl", schedule=1, on_error=on_error)
    error = RuntimeError("diverged")
    with pytest.raises(RuntimeError) as raised, tracker.step(0, MODEL, BATCH):
        raise error
    assert raised.value is error
    assert error.__cause__ is None
    assert "No space left" in told(quiet)[0]
    full.append("room")
    assert watch(tracker, [1]) == [1]


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_the_users_own_error_passes_through_a_tracker_that_cannot_be_closed(failing_disk, on_error, tmp_path, quiet):
    tracker, error = lnp.Tracker(tmp_path / "run.jsonl", schedule=1, on_error=on_error), RuntimeError("diverged")
    watch(tracker, [0])
    with pytest.raises(RuntimeError) as raised, tracker:
        raise error
    assert raised.value is error
    assert "Input/output error" in told(quiet)[0]


# --- models that are known not to be measurable ---------------------------------------------------------------------


@pytest.fixture
def refused(monkeypatch):
    asked = []

    def refusal(model):
        asked.append(model)
        return "The parameters are sharded. Measure a checkpoint."

    monkeypatch.setattr(lnp_numpy, "refusal", refusal, raising=False)
    return asked


def test_a_refused_model_is_told_of_and_not_measured(refused, monkeypatch, quiet):
    monkeypatch.setattr(lnp_numpy, "evaluate", lambda *a, **k: pytest.fail("it was measured"))
    tracker = lnp.Tracker(schedule=1, batch=Torn())
    assert tracker.check(MODEL) is False
    assert [tracker.observe(step, MODEL) for step in range(3)] == [None] * 3
    with tracker.step(3, MODEL) as watched:
        assert watched.decomposition is None
    assert tracker.measure(4, MODEL) is None
    assert tracker.state_dict()["batches"] == 0
    (text,) = told(quiet)
    assert "The parameters are sharded. Measure a checkpoint." in text


def test_idle_ranks_say_nothing_of_a_refused_model(refused, quiet):
    tracker = lnp.Tracker(schedule=1, rank=1)
    assert tracker.check(MODEL) is True
    assert watch(tracker, range(3)) == []
    assert refused == []
    assert not quiet


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("verb", ["observe", "measure", "step", "shared", "check"])
def test_every_rank_raises_alike_at_the_first_due_step(refused, monkeypatch, rank, verb):
    monkeypatch.setattr(lnp_numpy, "shared", lambda *a: pytest.fail("it was watched"), raising=False)
    tracker = lnp.Tracker(schedule=[2], rank=rank, on_error="raise")

    def call(step):
        if verb == "check":
            tracker.check(MODEL)
        elif verb == "step":
            with tracker.step(step, MODEL, BATCH):
                pass
        elif verb == "shared":
            tracker.shared(step, MODEL)
        else:
            getattr(tracker, verb)(step, MODEL, BATCH)

    if verb not in ("measure", "check"):
        call(0)
        call(1)
    with pytest.raises(ValueError, match="The parameters are sharded"):
        call(2)


def test_ranks_ask_once(monkeypatch):
    asked = []
    monkeypatch.setattr(lnp_numpy, "refusal", lambda model: asked.append(model), raising=False)
    tracker = lnp.Tracker(schedule=1, rank=1, on_error="raise")
    watch(tracker, range(4))
    assert len(asked) == 1
    assert tracker.check(MODEL) is True
    assert lnp.Tracker(rank=0).check(MODEL, reason=None) is True


def test_a_model_without_backend_and_a_reason_of_the_callers(quiet):
    tracker = lnp.Tracker()
    assert tracker.check(object()) is False
    assert tracker.check(MODEL, "Its host shards it.") is False
    assert "no backend accepts" in told(quiet)[0]
    assert "Its host shards it." in told(quiet)[1]


# --- shared steps -----------------------------------------------------------------------------------------------------


class Loss:
    """A loss that counts its backward passes."""

    def __init__(self):
        self.passes = 0

    def backward(self):
        self.passes += 1


class Step:
    """A backend's shared step, which fails where it is told to."""

    seconds = 0.0  # until the step's own pass has returned

    def __init__(self, fails):
        self.fails, self.stepped, self.left = fails, False, None
        self._at("made")

    def _at(self, where):
        if self.fails == where:
            raise NotImplementedError(f"refused: {where}")

    def __enter__(self):
        self._at("entered")
        return self

    def __exit__(self, *exception):
        self.left = exception
        self._at("left")

    def backward(self, loss, targets, criterion, **options):
        self._at("before")
        self.stepped = True
        loss.backward()
        self.seconds = 1e-3
        self._at("after")
        return lnp.decompose(MODEL, BATCH)


WHERE = ["made", "entered", "left", "before", "after"]


def shared_loop(monkeypatch, fails, **options):
    """Backward passes of each of three steps, and the tracker."""
    monkeypatch.setattr(lnp_numpy, "shared", lambda model, parameters: Step(fails), raising=False)
    tracker, passes = lnp.Tracker(schedule=1, **options), []
    for step in range(3):
        with tracker.shared(step, MODEL) as shared:
            loss = Loss()
        shared.backward(loss)
        passes.append(loss.passes)
    return passes, tracker


@pytest.mark.parametrize("fails", WHERE)
def test_a_shared_step_that_fails_runs_its_backward_pass_once(monkeypatch, fails, quiet):
    passes, tracker = shared_loop(monkeypatch, fails)
    assert passes == [1, 1, 1]
    assert len(tracker.history) == 0
    tracker.close()
    assert len(quiet) == 2
    assert f"refused: {fails}" in told(quiet)[0]
    assert "2 times more" in told(quiet)[1]


def test_a_shared_step_that_does_not_fail(monkeypatch):
    passes, tracker = shared_loop(monkeypatch, None)
    assert passes == [1, 1, 1]
    assert tracker.history["step"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("fails", WHERE)
def test_a_shared_step_that_fails_raises_where_that_is_wanted(monkeypatch, fails):
    with pytest.raises(NotImplementedError, match=f"refused: {fails}"):
        shared_loop(monkeypatch, fails, on_error="raise")


@pytest.mark.parametrize("on_error", ["warn", "raise"])
@pytest.mark.parametrize("fails", [None, "left"])
def test_the_users_error_in_a_shared_block_passes_through(monkeypatch, on_error, fails, quiet):
    monkeypatch.setattr(lnp_numpy, "shared", lambda model, parameters: Step(fails), raising=False)
    tracker, error = lnp.Tracker(schedule=1, on_error=on_error), RuntimeError("diverged")
    with pytest.raises(RuntimeError) as raised, tracker.shared(0, MODEL):
        raise error
    assert raised.value is error
    assert len(quiet) == (fails == "left")
    tracker.shared(1, MODEL)  # the step that was left by an error is not taken for a forgotten one
    assert len(quiet) == (fails == "left")


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_an_error_of_the_steps_own_backward_pass_is_the_users(monkeypatch, on_error, quiet):
    class Diverging(Loss):
        def backward(self):
            super().backward()
            raise error

    monkeypatch.setattr(lnp_numpy, "shared", lambda model, parameters: Step(None), raising=False)
    tracker, loss, error = lnp.Tracker(schedule=1, on_error=on_error), Diverging(), FloatingPointError("diverged")
    with tracker.shared(0, MODEL) as shared:
        pass
    with pytest.raises(FloatingPointError) as raised:
        shared.backward(loss)
    assert raised.value is error
    assert loss.passes == 1
    assert not quiet


def test_a_second_backward_pass_is_the_losss_own(monkeypatch, quiet):
    monkeypatch.setattr(lnp_numpy, "shared", lambda model, parameters: Step(None), raising=False)
    tracker, loss = lnp.Tracker(schedule=1), Loss()
    with tracker.shared(0, MODEL) as shared:
        pass
    shared.backward(loss)
    shared.backward(loss)
    assert loss.passes == 2
    assert not quiet


def test_a_full_disk_in_a_shared_step(monkeypatch, full, tmp_path, quiet):
    passes, tracker = shared_loop(monkeypatch, None, path=tmp_path / "run.jsonl")
    assert passes == [1, 1, 1]
    assert len(tracker.history) == 0


def test_a_backward_pass_out_of_habit_is_told(monkeypatch, quiet):
    monkeypatch.setattr(lnp_numpy, "shared", lambda model, parameters: Step(None), raising=False)
    tracker = lnp.Tracker(schedule=[0, 2])
    for step in range(3):
        with tracker.shared(step, MODEL):
            loss = Loss()
        loss.backward()
        assert len(quiet) == (step > 0)
    assert "lnp at step 0: A shared step was watched, and its shared.backward() was never called" in told(quiet)[0]
    tracker.close()  # which tells of step 2
    assert "once more (steps 2 to 2)" in told(quiet)[1]
    strict = lnp.Tracker(schedule=1, on_error="raise")
    with strict.shared(0, MODEL):
        pass
    with pytest.raises(RuntimeError, match="never called"):
        strict.shared(1, MODEL)
