"""The loss change of a step that was taken, and the row that says so."""

from __future__ import annotations

import numpy as np
import pytest

import lnp
import lnp_numpy

GENERATOR = np.random.default_rng(0)
BATCH = (GENERATOR.standard_normal((8, 3)), GENERATOR.standard_normal((8, 2)))
BEFORE = lnp_numpy.LinearModel(weight=GENERATOR.standard_normal((3, 2)))
UPDATE = 0.1 * GENERATOR.standard_normal((3, 2))
AFTER = lnp_numpy.LinearModel(weight=BEFORE.weight + UPDATE)


def loss(model):
    return np.mean((BATCH[0] @ model.weight - BATCH[1]) ** 2)


def test_predicted_and_measured():
    step = lnp.step_taken(BEFORE, AFTER, BATCH)
    gradient = 2 * BATCH[0].T @ (BATCH[0] @ BEFORE.weight - BATCH[1]) / BATCH[1].size
    assert step.predicted == pytest.approx(np.sum(gradient * UPDATE), rel=1e-12)
    assert step.measured == pytest.approx(loss(AFTER) - loss(BEFORE), rel=1e-12)


def test_samples_are_not_taken_apart_which_no_step_needs(monkeypatch):
    backend, asked = lnp.load("numpy"), []
    plain = backend.evaluate
    monkeypatch.setattr(backend, "evaluate", lambda *given, **more: asked.append(given[3]) or plain(*given, **more))
    lnp.step_taken(BEFORE, AFTER, BATCH)
    assert [(options.split, options.population) for options in asked] == [(False, False)]


def test_the_row_of_a_step_is_written_after_it(tmp_path):
    path = tmp_path / "run.jsonl"
    tracker = lnp.Tracker(path, schedule=2)
    for step in range(3):
        with tracker.step(step, BEFORE, BATCH, learning_rate=0.1) as watched:
            watched.after(AFTER)
            assert (watched.decomposition is None) == (step == 1)
            assert len(tracker.history) == (0, 1, 1)[step]
    taken = lnp.step_taken(BEFORE, AFTER, BATCH)
    for history in (tracker.history, lnp.History.read(path)):
        assert history["step"].tolist() == [0, 2]
        assert history["update/predicted"].tolist() == [taken.predicted] * 2
        assert history["update/measured"].tolist() == [taken.measured] * 2
        assert history["learning_rate"].tolist() == [0.1] * 2


def test_on_the_trackers_own_batch():
    tracker = lnp.Tracker(schedule=1, batch=[BATCH, (BATCH[0][:3], BATCH[1][:3])])
    for step in range(2):
        with tracker.step(step, BEFORE) as watched:
            watched.after(AFTER)
    assert tracker.history["update/measured"][0] == pytest.approx(loss(AFTER) - loss(BEFORE))
    assert tracker.history["samples"].tolist() == [8, 3]


def test_a_row_is_kept_when_the_step_fails():
    tracker = lnp.Tracker(schedule=1)
    with pytest.raises(RuntimeError, match="diverged"), tracker.step(0, BEFORE, BATCH):
        raise RuntimeError("diverged")
    assert tracker.history["step"].tolist() == [0]
    assert "update/measured" not in tracker.history


def test_models_that_cannot_be_compared():
    model = lnp_numpy.LinearModel(weight=np.zeros((3, 2)))
    with pytest.raises(TypeError, match="no backend accepts"):
        lnp.snapshot(object())
    assert lnp.snapshot(model) is model
