"""What a tracker measures with where the user leaves options out, and models whose update makes new ones."""

from __future__ import annotations

import dataclasses
import json
from typing import NamedTuple

import numpy as np
import pytest

import lnp
import lnp_numpy
from core.failing import recorded, told
from lnp.tracking import measurement
from lnp.tracking.names import RESUMED
from lnp.tracking.storage import Appender

quiet = pytest.fixture(recorded)
RNG = np.random.default_rng(0)
BATCH = (RNG.normal(size=(40, 5)), RNG.normal(size=(40, 30)))


def model(scale=1.0):
    return lnp_numpy.LinearModel(weight=scale * np.ones((5, 30)))


class OfParts(NamedTuple):
    weight: float


@dataclasses.dataclass
class Changing:
    weight: float


@pytest.mark.parametrize(
    ("made", "immutable"), [(OfParts(1.0), True), (model(), True), (Changing(1.0), False), (object(), False)]
)
def test_which_models_an_update_makes_anew(made, immutable):
    assert measurement._is_immutable(made) is immutable


def test_an_update_of_such_a_model_that_is_not_told_has_no_row_of_zeros(quiet):
    tracker = lnp.Tracker(schedule=1)
    for step in range(2):
        with tracker.step(step, model(), BATCH):
            pass
    assert len([text for text in told(quiet) if "watched.after" in text]) == 1
    assert not any(name.startswith("update/") for name in tracker.history.columns)
    with tracker.step(2, model(), BATCH) as watched:
        watched.after(model())
    assert tracker.history["update/measured"][-1] == 0


def test_a_tracker_without_a_seed_has_that_of_zero():
    rows, operator = [], lnp_numpy.OperatorModel(np.zeros((10, 4)), RNG.normal(size=(40, 90)))
    for options in ({}, {"seed": 0}, {"seed": 1}):
        tracker = lnp.Tracker(schedule=1, estimator="joint", rtol=0.0, max_probes=2, **options)
        tracker.observe(3, operator, (None, np.ones((10, 4))))
        rows.append(tracker.history["chi_net"].tolist())
    assert rows[0] == rows[1] != rows[2]


@pytest.mark.parametrize(("asked", "group"), [({}, None), ({"group": "auto"}, "auto")])
def test_processes_measure_together_where_they_are_asked_to(asked, group, monkeypatch):
    received = []

    def measured(step, model, batch, own, options):
        received.append(options["group"])
        raise ValueError("enough")

    monkeypatch.setattr(measurement, "decompose_batches", measured)
    tracker = lnp.Tracker(schedule=1, on_error="raise", **asked)
    with pytest.raises(ValueError, match="enough"):
        tracker.observe(0, model(), BATCH)
    assert received == [group]


def test_values_that_options_have_the_names_of_are_columns():
    tracker = lnp.Tracker(schedule=1, on_error="raise")
    tracker.observe(0, model(), BATCH, seed=3, parameters=7)
    assert (tracker.history["seed"].tolist(), tracker.history["parameters"].tolist()) == ([3], [7])


def test_a_step_that_is_recorded_twice_has_one_row():
    tracker = lnp.Tracker(schedule=1, on_error="raise")
    first, second = (lnp.decompose(model(scale), BATCH) for scale in (1.0, 2.0))
    for decomposition in (first, second):
        tracker.record(4, decomposition)
    assert tracker.history["loss"].tolist() == [first.loss]


def test_a_row_of_the_last_step_again_says_that_the_run_went_back(tmp_path):
    with lnp.Tracker(tmp_path / "run.jsonl", schedule=1) as tracker:
        tracker._recorder.open(0)
        for loss in (1.0, 2.0):
            tracker._recorder.keep({"step": 5, "loss": loss}, (), (), False)
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert [json.loads(line).get(RESUMED) for line in lines] == [None, 5]
    assert lnp.History.read(tmp_path / "run.jsonl")["loss"].tolist() == [2.0]


def test_a_run_that_goes_back_before_its_file_opens_replaces_what_it_has_from_there_on(tmp_path, monkeypatch, quiet):
    path, tried = tmp_path / "run.jsonl", []

    def opened(*arguments):
        tried.append(arguments)
        if len(tried) == 1:
            raise BlockingIOError("another process is writing")
        return Appender(*arguments)

    monkeypatch.setattr("lnp.tracking.recorder.Appender", opened)
    lnp.History([{"step": step, "loss": 1.0} for step in range(7)]).to_jsonl(path)
    with lnp.Tracker(path, schedule=lnp.schedule.at([3])) as tracker:
        for step in (5, 2, 3):
            tracker.observe(step, model(), BATCH)
        assert tracker.history["step"].tolist() == [0, 1, 3]
    assert lnp.History.read(path)["step"].tolist() == [0, 1, 3]
    assert any("another process is writing" in text for text in told(quiet))
