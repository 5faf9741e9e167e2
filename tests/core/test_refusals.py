"""Updates and models that cannot be measured: told of, or refused in every process alike, before anything happens."""

from __future__ import annotations

import contextlib

import pytest

import lnp
import lnp_numpy
from core.failing import BATCH, MODEL, Torn, failing_disk, full_disk, recorded, told, watch
from lnp.schedule import budget

quiet = pytest.fixture(recorded)
full = pytest.fixture(full_disk)
broken = pytest.fixture(failing_disk)


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
def test_the_users_own_error_passes_through_a_tracker_that_cannot_be_closed(broken, on_error, tmp_path, quiet):
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
    for verb in ("evaluate", "snapshot"):
        monkeypatch.setattr(lnp_numpy, verb, lambda *a, **k: pytest.fail("it was measured"))
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
    assert tracker.check(None, "Its host shards it.") is False
    assert "no backend accepts" in told(quiet)[0]
    assert "Its host shards it." in told(quiet)[1]


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"estimator": "best"}, {"rtol": -1}, {"seed": -1}, {"microbatch": 0}, {"batch_statistics": "running"}]
)
def test_values_that_cannot_be_are_refused_at_once(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}"):
        lnp.Tracker(**wrong)
    tracker = lnp.Tracker(schedule=[5])
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}"):
        tracker.observe(0, MODEL, BATCH, options=wrong)


# --- models that several processes hold together ---------------------------------------------------------------------


def joined(monkeypatch, number):
    """A framework that computes with other processes as one, each of which holds a part of the model."""
    monkeypatch.setattr(lnp_numpy, "process_number", lambda: number, raising=False)
    monkeypatch.setattr(lnp_numpy, "needs_all", lambda model: model is MODEL, raising=False)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("rank", [None, 1])
def test_all_measure_what_all_hold_and_the_first_keeps_the_rows(monkeypatch, tmp_path, number, rank):
    joined(monkeypatch, number)
    rows = []
    tracker = lnp.Tracker(tmp_path / "run.jsonl", [0, 2], rank=rank, loggers=lambda values, step: rows.append(step))
    assert tracker.due(0)
    assert [tracker.observe(step, MODEL, BATCH) is not None for step in range(3)] == [True, False, True]
    with tracker.step(3, MODEL, BATCH) as watched:
        assert watched.decomposition is None
    first = number == 0 and rank is None
    assert rows == [0, 2] * first
    assert (tmp_path / "run.jsonl").exists() == first


def test_another_model_is_measured_by_one_of_the_processes(monkeypatch):
    joined(monkeypatch, 1)
    other = lnp_numpy.LinearModel(weight=MODEL.weight)
    assert lnp.Tracker(schedule=1).observe(0, other, BATCH) is None


def test_what_all_hold_is_measured_where_no_rows_can_be_kept(monkeypatch, tmp_path, quiet):
    joined(monkeypatch, 0)
    first, second = (lnp.Tracker(tmp_path / "run.jsonl", schedule=1) for _ in range(2))
    watch(first, [0])
    assert second.observe(0, MODEL, BATCH) is not None
    assert "run.jsonl" in told(quiet)[0]


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_what_one_process_cannot_measure_is_not_refused_where_all_measure_it(monkeypatch, on_error):
    joined(monkeypatch, 1)
    monkeypatch.setattr(lnp_numpy, "refusal", lambda model: "another process holds a part", raising=False)
    tracker = lnp.Tracker(schedule=1, on_error=on_error)
    assert tracker.check(MODEL)
    assert tracker.observe(0, MODEL, BATCH) is not None


@pytest.mark.parametrize("number", [0, 1])
def test_processes_that_may_not_choose_the_same_steps_measure_none(monkeypatch, number, quiet):
    joined(monkeypatch, number)
    with pytest.raises(ValueError, match="a budget of time, which each process spends"):
        watch(lnp.Tracker(schedule=budget(0.1), on_error="raise"), [0])
    assert watch(lnp.Tracker(schedule=budget(0.1)), range(2)) == []
    assert len(quiet) == (number == 0)  # the process that keeps the rows tells of it


def test_only_what_one_process_measures_may_not_wait_for_others(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def alone():
        entered.append(True)
        yield

    joined(monkeypatch, 0)
    monkeypatch.setattr(lnp_numpy, "alone", alone, raising=False)
    assert lnp.Tracker(schedule=1).observe(0, MODEL, BATCH) is not None
    assert not entered
    assert lnp.Tracker(schedule=1).observe(0, lnp_numpy.LinearModel(weight=MODEL.weight), BATCH) is not None
    assert entered


def test_what_an_update_does_is_measured_by_one_process_also_in_a_group(monkeypatch):
    joined(monkeypatch, 1)
    other = lnp_numpy.LinearModel(weight=MODEL.weight)
    tracker = lnp.Tracker(schedule=1, group="auto", on_error="raise")
    with tracker.step(0, other, BATCH) as watched:
        assert watched.decomposition is None
    assert tracker.observe(1, other, BATCH) is not None
