"""Shared steps that fail run the step's own backward pass once, and not twice."""

from __future__ import annotations

import time

import pytest

import lnp
import lnp_numpy
from core.failing import BATCH, MODEL, full_disk, recorded, told

quiet = pytest.fixture(recorded)
full = pytest.fixture(full_disk)


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
        self.fails, self.stepped, self.left, self.criteria = fails, False, None, []
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
        self.criteria.append(criterion)
        if self.stepped:
            raise RuntimeError("the model was not called since")
        self.stepped, started = True, time.perf_counter()
        loss.backward()
        self.seconds = time.perf_counter() - started
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


def test_the_loss_of_a_shared_step_is_the_given_one_and_else_the_trackers(monkeypatch):
    step = Step(None)
    monkeypatch.setattr(lnp_numpy, "shared", lambda model, parameters: step, raising=False)
    tracker = lnp.Tracker(schedule=1, loss="mse")
    for number, given in enumerate([None, "cross_entropy"]):
        step.stepped = False
        with tracker.shared(number, MODEL) as shared:
            pass
        shared.backward(Loss(), BATCH[1], given)
    assert step.criteria == ["mse", "cross_entropy"]


def test_a_shared_step_costs_what_it_takes_beside_its_own_pass(monkeypatch):
    class Slow(Loss):
        def backward(self):
            time.sleep(0.05)

    step = Step(None)
    monkeypatch.setattr(lnp_numpy, "shared", lambda model, parameters: step, raising=False)
    tracker = lnp.Tracker(schedule=1)
    with tracker.shared(0, MODEL) as shared:
        pass
    started = time.perf_counter()
    shared.backward(Slow())
    passed = time.perf_counter() - started
    assert 0 < tracker.history["seconds"][0] <= passed - step.seconds


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
