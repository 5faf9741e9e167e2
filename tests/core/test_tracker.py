"""A tracker measures when it should, writes it once, and continues where a run was left."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import random
import sys
import time

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp.schedule import budget, log_windows

GENERATOR = np.random.default_rng(0)
MODEL = lnp_numpy.LinearModel(weight=GENERATOR.standard_normal((3, 2)))
BATCH = (GENERATOR.standard_normal((8, 3)), GENERATOR.standard_normal((8, 2)))
OTHER = (GENERATOR.standard_normal((5, 3)), GENERATOR.standard_normal((5, 2)))


def train(tracker, steps, model=MODEL, batch=BATCH):
    return [step for step in steps if tracker.observe(step, model, batch) is not None]


def test_it_measures_what_decompose_does():
    tracker = lnp.Tracker(schedule=2, by_layer=True, tags={"width": 3})
    started = time.perf_counter()
    d = tracker.observe(0, MODEL, BATCH, learning_rate=0.1)
    passed = time.perf_counter() - started
    assert d == lnp.decompose(MODEL, BATCH, by_layer=True)
    assert tracker.observe(1, MODEL, BATCH) is None
    row = tracker.history.rows()[0]
    assert row | d.to_dict() == row
    assert (row["step"], row["width"], row["learning_rate"]) == (0, 3, 0.1)
    assert 0 < row["seconds"] <= passed
    assert abs(row["time"] - time.time()) < 60
    assert tracker.history.layers == ("weight",)


def test_a_step_can_be_measured_that_the_schedule_does_not_name():
    tracker = lnp.Tracker(schedule=100)
    assert tracker.measure(3, MODEL, BATCH) == lnp.decompose(MODEL, BATCH)
    assert tracker.measure(3, MODEL, BATCH) is None
    assert tracker.history["step"].tolist() == [3]


def test_signs_change_with_the_step_and_not_from_run_to_run():
    options = {"estimator": "joint", "max_probes": 2}
    rows = [lnp.Tracker(schedule=1, **options) for _ in range(2)]
    for tracker in rows:
        train(tracker, range(3))
    values = [tracker.history["chi_net"].tolist() for tracker in rows]
    assert values[0] == values[1]
    assert len(set(values[0])) == 3


def test_an_unscheduled_step_does_next_to_nothing(tmp_path):
    tracker = lnp.Tracker(tmp_path / "run.jsonl", lambda step: step == 0)
    tracker.observe(0, MODEL, BATCH)
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        for step in range(1, 101):
            tracker.observe(step, None, None)
    finally:
        sys.setprofile(None)
    assert len(calls) <= 5 * 100  # the schedule, and how the tracker comes to it
    assert len(tracker.history) == 1


def test_what_a_checkpoint_saw_stays(tmp_path):
    path = tmp_path / "run.jsonl"
    with lnp.Tracker(path, schedule=1) as tracker:
        train(tracker, range(5))
        state = tracker.state_dict()
    resumed = lnp.Tracker(path, schedule=1)
    resumed.load_state_dict(state)
    assert train(resumed, [3, 5]) == [5]  # the checkpoint knows step 3; step 4 is left out by this run
    assert resumed.history["step"].tolist() == [0, 1, 2, 3, 5]


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_run_that_begins_at_the_last_step_leaves_it_out_though_it_is_not_measured_again(tmp_path, on_disk):
    path = tmp_path / "run.jsonl" if on_disk else None
    with lnp.Tracker(path, schedule=4) as tracker:
        train(tracker, range(9))
    resumed = lnp.Tracker(path, schedule=3)
    resumed.load_state_dict(tracker.state_dict())
    assert train(resumed, range(8, 11)) == [9]
    assert resumed.history["step"].tolist() == [0, 4, 9]


def test_a_step_is_measured_once(tmp_path):
    tracker = lnp.Tracker(tmp_path / "run.jsonl", schedule=1)
    assert train(tracker, [0, 0, 1, 1, 1, 2]) == [0, 1, 2]
    assert tracker.history["step"].tolist() == [0, 1, 2]


def test_a_resumed_run_continues_its_file(tmp_path):
    path = tmp_path / "run.jsonl"
    with lnp.Tracker(path, schedule=2) as tracker:
        train(tracker, range(9))
    with lnp.Tracker(path, schedule=2) as tracker:
        assert tracker.history["step"].tolist() == [0, 2, 4, 6, 8]
        train(tracker, range(9, 13))
    assert lnp.History.read(path)["step"].tolist() == [0, 2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("schedule", [1, 2, 3, 100, log_windows(1)])
def test_no_step_counts_twice_after_going_back_with_another_schedule(tmp_path, schedule):
    path = tmp_path / "run.jsonl"
    with lnp.Tracker(path, schedule=2) as tracker:
        train(tracker, range(9))  # killed after step 8, resumed from a checkpoint at 5
    with lnp.Tracker(path, schedule=schedule) as tracker:
        measured = train(tracker, range(5, 12))
        expected = [0, 2, 4, *measured]
        assert tracker.history["step"].tolist() == expected
    back = lnp.History.read(path)["step"].tolist()
    assert back == (expected if measured else [0, 2, 4, 6, 8])  # only a record can replace others


def test_a_run_that_goes_back_in_one_process(tmp_path):
    for path in (None, tmp_path / "run.jsonl"):
        tracker = lnp.Tracker(path, schedule=2)
        train(tracker, [*range(9), *range(5, 8)])
        assert tracker.history["step"].tolist() == [0, 2, 4, 6]
    assert lnp.History.read(path)["step"].tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("on_disk", [True, False])
def test_state_goes_through_a_checkpoint(tmp_path, on_disk):
    path = tmp_path / "run.jsonl" if on_disk else None
    loader = Loader([BATCH, OTHER, BATCH])
    tracker = lnp.Tracker(path, budget(0.9), batch=loader)
    train(tracker, range(4), batch=None)
    state = json.loads(json.dumps(tracker.state_dict()))
    rows = tracker.history.rows()
    tracker.close()
    resumed = lnp.Tracker(path, schedule=1, batch=Loader([BATCH, OTHER, BATCH]))
    resumed.load_state_dict(state)
    assert repr(resumed.history.rows()) == repr(rows)
    following = len(rows) % 3
    d = resumed.observe(4, MODEL)
    assert d.samples == (5 if following == 1 else 8)
    with pytest.raises(ValueError, match="version 99"):
        resumed.load_state_dict({"version": 99})


def test_a_checkpoint_goes_on_where_the_tracker_has_batches_of_its_own_no_longer_or_only_now():
    alone, own = lnp.Tracker(schedule=1), lnp.Tracker(schedule=1, batch=[OTHER, BATCH])
    train(alone, range(2))
    train(own, range(2))
    without, fresh = lnp.Tracker(schedule=1), lnp.Tracker(schedule=1, batch=[OTHER, BATCH])
    without.load_state_dict(own.state_dict())
    fresh.load_state_dict(alone.state_dict())
    assert without.observe(2, MODEL, BATCH).samples == 8
    assert fresh.observe(2, MODEL).samples == 5


class Loader:
    """Draws from the global random states, as loaders do."""

    def __init__(self, batches):
        self.batches, self.rounds = batches, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.rounds += 1
        for batch in self.batches:
            random.random(), np.random.rand()  # noqa: NPY002
            yield batch


def test_a_loader_is_gone_through_again_and_leaves_no_trace():
    loader = Loader([BATCH, OTHER])
    tracker = lnp.Tracker(schedule=1, batch=loader)
    states = random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    samples = [tracker.observe(step, MODEL).samples for step in range(5)]
    assert samples == [8, 5, 8, 5, 8]
    assert loader.rounds == 3
    assert states == (random.getstate(), repr(np.random.get_state()))  # noqa: NPY002


def test_a_list_of_batches_is_a_loader_and_a_generator_is_used_up():
    tracker = lnp.Tracker(schedule=1, batch=[BATCH, OTHER])
    assert [tracker.observe(step, MODEL).samples for step in range(3)] == [8, 5, 8]
    tracker = lnp.Tracker(schedule=1, batch=iter([BATCH]), on_error="raise")
    tracker.observe(0, MODEL)
    with pytest.raises(ValueError, match="no more batches after 1"):
        tracker.observe(1, MODEL)


def test_a_list_of_inputs_and_targets_is_one_batch_though_inputs_have_names():
    def jacobian(parameters, inputs):
        return {"w": np.einsum("ni,jk->njik", inputs["x"], np.eye(2))}

    named = lnp_numpy.JacobianModel(lambda p, inputs: inputs["x"] @ p["w"], jacobian, {"w": MODEL.weight})
    tracker = lnp.Tracker(schedule=1, batch=[{"x": BATCH[0]}, BATCH[1]], on_error="raise")
    assert tracker.observe(0, named).rate == pytest.approx(lnp.decompose(MODEL, BATCH).rate)


def test_cross_response_to_a_batch_of_its_own():
    tracker = lnp.Tracker(schedule=1, batch=OTHER, by_layer=True)
    d = tracker.observe(0, MODEL, BATCH)
    row = tracker.history.rows()[0]
    cross = lnp.cross_response(MODEL, BATCH, OTHER)
    alone = lnp.decompose(MODEL, OTHER)
    assert d.samples == 8
    assert row["rate"] == lnp.decompose(MODEL, BATCH).rate
    assert row["cross/chi_pos"] == cross.chi_pos
    assert row["cross/rate"] == pytest.approx(row["cross/chi_loss"] * row["cross/chi_net"] * row["cross/chi_pos"])
    assert row["measured/chi_net"] == alone.chi_net
    assert "layer/weight/chi_pos" in row


def test_without_any_batch_it_says_so():
    with pytest.raises(ValueError, match="received no batch"):
        lnp.Tracker(schedule=1, on_error="raise").observe(0, MODEL)


def test_only_rank_0_measures(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    for rank in (1, lambda: 3):
        tracker = lnp.Tracker(path, schedule=1, rank=rank)
        assert train(tracker, range(3)) == []
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert train(lnp.Tracker(path, schedule=1), range(3)) == []
    assert not path.exists()
    monkeypatch.setenv("RANK", "0")
    assert train(lnp.Tracker(path, schedule=1), range(3)) == [0, 1, 2]
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="RANK is 'first'"):
        lnp.Tracker(schedule=1, on_error="raise").observe(0, MODEL, BATCH)
    with pytest.warns(UserWarning, match="RANK is 'first'"):
        assert train(lnp.Tracker(schedule=1), range(3)) == []


def test_trackers_side_by_side_and_two_on_one_file(tmp_path):
    a, b = (lnp.Tracker(tmp_path / f"{name}.jsonl", schedule=1) for name in "ab")
    train(a, range(3)), train(b, range(2))
    assert (len(a.history), len(b.history)) == (3, 2)
    with pytest.warns(UserWarning, match="was still open in an earlier tracker"):
        train(lnp.Tracker(tmp_path / "a.jsonl", schedule=1), range(3, 5))
    assert lnp.History.read(tmp_path / "a.jsonl")["step"].tolist() == [0, 1, 2, 3, 4]


def test_nan_and_inf_are_kept(tmp_path):
    path = tmp_path / "run.jsonl"
    wild = lnp_numpy.LinearModel(weight=np.full((3, 2), np.inf))
    with np.errstate(all="ignore"), lnp.Tracker(path, schedule=1) as tracker:
        tracker.observe(0, wild, BATCH, odd=-math.inf)
    row = lnp.History.read(path).rows()[0]
    assert math.isnan(row["chi_pos"])
    assert row["odd"] == -math.inf
    assert "not finite" in row["notes"]


def test_notes_are_written_when_they_change():
    tracker = lnp.Tracker(schedule=1, estimator="joint", max_probes=2)
    train(tracker, range(2))
    flat = lnp_numpy.LinearModel(weight=np.linalg.lstsq(BATCH[0][:3], BATCH[1][:3], rcond=None)[0])
    exact = (BATCH[0][:3], BATCH[0][:3] @ flat.weight)
    tracker.observe(2, flat, exact), tracker.observe(3, flat, exact)
    noted = [row["step"] for row in tracker.history.rows() if row.get("notes")]
    assert noted == [0, 2] or noted == [2]


def test_windows_are_part_of_the_rows():
    tracker = lnp.Tracker(schedule=log_windows(1, width=3))
    train(tracker, range(13))
    assert tracker.history["step"].tolist() == [0, 1, 2, 9, 10, 11]
    assert tracker.history["window"].tolist() == [0, 1, 1, 10, 10, 10]


def test_loggers_get_floats_and_a_failing_one_is_dropped():
    seen = []

    def broken(values, step):
        raise ConnectionError("no network")

    tracker = lnp.Tracker(schedule=1, loggers=[broken, lambda values, step: seen.append((step, values))])
    with pytest.warns(UserWarning, match="ConnectionError: no network"):
        tracker.observe(0, MODEL, BATCH)
    tracker.observe(1, MODEL, BATCH)
    assert [step for step, _ in seen] == [0, 1]
    assert seen[0][1]["lnp/chi_pos"] == tracker.history["chi_pos"][0]
    assert all(type(value) is float and name.startswith("lnp/") for name, value in seen[0][1].items())
    assert "lnp/time" not in seen[0][1]


def test_the_budget_learns_what_measuring_costs():
    schedule = budget(0.02)
    tracker = lnp.Tracker(schedule=schedule)
    train(tracker, range(3))
    assert tracker.history["step"].tolist() == [0, 1]
    assert schedule.state_dict()["cost"] == tracker.history["seconds"][1]


def test_wrong_options_are_refused_at_once():
    with pytest.raises(TypeError, match="received the options by_layers"):
        lnp.Tracker(by_layers=True)
    with pytest.raises(TypeError, match="batch= is of type int"):
        lnp.Tracker(batch=3)
    with pytest.raises(TypeError, match="A logger is of type int"):
        lnp.Tracker(loggers=3)
    with pytest.raises(ValueError, match=r"Unknown loss 'xent'\. Expected one of 'cross_entropy', 'mse'"):
        lnp.Tracker(loss="xent")
    with pytest.raises(ValueError, match="on_error is 'ignore'"):
        lnp.Tracker(on_error="ignore")


def test_a_copy_in_another_process_opens_the_file_itself(tmp_path):
    tracker = lnp.Tracker(tmp_path / "run.jsonl", schedule=5)
    train(tracker, range(3))
    tracker.close()
    copy = pickle.loads(pickle.dumps(tracker))
    assert train(copy, range(3, 11)) == [5, 10]


def test_decompositions_from_elsewhere_are_kept(tmp_path):
    path, d = tmp_path / "run.jsonl", lnp.decompose(MODEL, BATCH)
    with lnp.Tracker(path, schedule=2, tags={"width": 3}) as tracker:
        for step in range(4):
            if tracker.due(step):
                tracker.record(step, d, learning_rate=0.1)
        tracker.record(2, d)  # has a row already
        tracker.record(3, d)  # whatever the schedule says
    rows = lnp.History.read(path).rows()
    assert [row["step"] for row in rows] == [0, 2, 3]
    assert rows[0] | d.to_dict() == rows[0]
    assert (rows[0]["learning_rate"], rows[0]["width"], "seconds" in rows[0]) == (0.1, 3, False)
    assert tracker.latest["lnp/chi_pos"] == d.chi_pos
    silent = lnp.Tracker(rank=1)
    silent.record(0, d)
    assert len(silent.history) == 0


def test_arrays_of_compiled_functions_are_kept_as_the_numbers_that_they_hold():
    class Scalar:
        """An array of a framework whose scalars have no `item`."""

        def __float__(self):
            return 0.25

    d = lnp.decompose(MODEL, BATCH)
    tracker = lnp.Tracker(on_error="raise")
    tracker.record(0, dataclasses.replace(d, rate=np.asarray(d.rate), probes=np.asarray(d.probes), loss=Scalar()))
    row = tracker.history.rows()[0]
    assert row | d.to_dict() | {"loss": 0.25} == row
    assert (type(row["probes"]), tracker.history["probes"].dtype) == (int, np.int64)
    assert tracker.latest["lnp/rate"] == d.rate


def test_steps_of_other_models_are_not_watched():
    with pytest.raises(TypeError, match=r"LinearModel cannot be watched.*tracker\.record"):
        lnp.Tracker(schedule=1).shared(0, MODEL)
    with pytest.raises(TypeError, match="batches of its own"):
        lnp.Tracker(schedule=1, batch=BATCH).shared(0, MODEL)
    with pytest.raises(TypeError, match="LinearModel cannot be watched"):  # now, and not when a step is due
        lnp.Tracker(schedule=[1000]).shared(0, MODEL)


def test_seeds_of_numpy_move_too():
    options = {"estimator": "joint", "max_probes": 2}
    found = [lnp.Tracker(schedule=1, seed=seed, **options).observe(4, MODEL, BATCH) for seed in (3, np.int64(3))]
    assert found[0] == found[1] == lnp.decompose(MODEL, BATCH, seed=7, **options)
