"""Samples that keep apart when they are first compared, and meet later: what each part of the looks has to see."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import lnp
from contract.namespaces import tensorflow
from integrations.tensorflow_reference import dense
from integrations.test_tensorflow_models import Wrapped, agrees, normal, squared
from lnp_tensorflow import apart, measurement, self_check

tensorflow()
LATER = "in this measurement or one before"


def opened(gate):
    return tf.maximum(gate - 1, 0)


def gated(p, x):
    h = tf.tanh(x @ p["w"])
    return h + opened(p["gate"]) * tf.reduce_mean(h, 0)


def gate(function=gated, closed=0.5, **more):
    return Wrapped(function, {"w": normal(3, 2), "gate": np.asarray(closed)} | more)


def batch_of(samples, outputs=2):
    return tf.constant(normal(samples, 3, seed=1)), tf.constant(normal(samples, outputs, seed=2))


def right(model, batch, d):
    x, y = batch
    agrees(d, dense(lambda: model(x), model.trainable_variables, squared(y), y.shape.num_elements()), "float64")


@pytest.fixture
def blind(monkeypatch):
    """The sample that is run alone shows nothing."""
    monkeypatch.setattr(apart, "look_at_one", lambda *given: self_check.Look(tf.constant(0.0), None))


def both(p, x):
    h = tf.tanh(x @ p["w"])
    return h + p["gate"] * p["behind"] * tf.reduce_mean(h, 0)


@pytest.mark.parametrize("kind", ["variables", "arrays", "compiled by XLA"])
def test_a_gate_behind_a_gate_is_seen_at_other_parameters(kind):
    """Each alone hides what the other does, from any comparison at the parameters as they are."""
    model, batch = gate(both, 0.0, behind=np.zeros(())), batch_of(6)
    handed = model
    if kind == "arrays":
        handed = both, {name: tf.constant(p.numpy()) for name, p in model.p.items()}
    how = {"jit_compile": True} if kind == "compiled by XLA" else {}
    before = [p.numpy() for p in model.variables]
    d = lnp.load("tensorflow").decompose(handed, batch, "mse", estimator="exact", **how)
    assert any("interact" in note and LATER not in note for note in d.notes), d.notes
    assert all(np.array_equal(p, was) for p, was in zip(model.variables, before, strict=True))


@pytest.mark.parametrize("samples", [20, 40])
def test_two_samples_that_meet_although_neither_is_compared(samples):
    def pair(p, x):
        h = tf.tanh(x @ p["w"])
        return h + tf.tensor_scatter_nd_update(tf.zeros_like(h), [[1]], h[2:3]) if h.shape[0] > 2 else h

    model, batch = Wrapped(pair, {"w": normal(3, 2)}), batch_of(samples)
    d = lnp.decompose(model, batch, "mse", estimator="exact")
    assert any("interact" in note and LATER not in note for note in d.notes), d.notes
    right(model, batch, d)


def test_a_measurement_is_made_again_and_remembered(monkeypatch):
    model, batch = gate(), batch_of(6)
    assert lnp.decompose(model, batch, "mse", estimator="exact").probes == 2
    model.p["gate"].assign(2.0)
    d = lnp.decompose(model, batch, "mse", estimator="exact")
    right(model, batch, d)
    assert d.probes == 12
    assert any(LATER in note for note in d.notes), d.notes
    runs, run = [], measurement.run_traced
    monkeypatch.setattr(measurement, "run_traced", lambda body, *given: runs.append(body) or run(body, *given))
    lnp.decompose(model, batch, "mse", estimator="exact")
    assert runs == [measurement.measure]


def test_a_gate_that_is_hardly_open_shows_in_the_gradient():
    """By less than the tolerance of float32 in the outputs."""
    model = Wrapped(gated, {"w": normal(3, 2).astype("f"), "gate": np.float32(0.5)})
    batch = tuple(tf.cast(part, tf.float32) for part in batch_of(6))
    for population in (True, False):
        lnp.decompose(model, batch, "mse", population=population)
    model.p["gate"].assign(1 + 1e-4)
    d = lnp.decompose(model, batch, "mse", estimator="exact", population=False)
    assert any(LATER in note for note in d.notes), d.notes


def test_outputs_that_others_shift_without_a_gradient():
    """Only the outputs of the sample that is looked at show it."""

    def shifted(p, x):
        h = tf.tanh(x @ p["w"])
        return h + tf.stop_gradient(opened(p["gate"]) * tf.reduce_mean(h, 0))

    model, batch = gate(shifted), batch_of(6)
    lnp.decompose(model, batch, "mse", estimator="exact")
    model.p["gate"].assign(2.0)
    assert any(LATER in note for note in lnp.decompose(model, batch, "mse", estimator="exact").notes)


def test_with_micro_batches_it_is_an_error():
    model, batch = gate(), batch_of(6)
    lnp.decompose(model, batch, "mse", microbatch=2)
    model.p["gate"].assign(1 + 1e-4)
    for _ in range(2):  # what was found is remembered
        with pytest.raises(ValueError, match="microbatch=2 was asked for"):
            lnp.decompose(model, batch, "mse", microbatch=2)


@pytest.mark.parametrize("pair", [0, 6])
def test_another_sample_is_looked_at_each_time(pair):
    """Where two of eight meet, some measurement finds it."""

    def meeting(p, x):
        h = tf.tanh(x @ p["w"])
        if h.shape[0] != 8:
            return h
        return h + tf.one_hot(pair, 8, dtype=h.dtype)[:, None] * opened(p["gate"]) * h[pair + 1]

    model, batch = gate(meeting), batch_of(8)
    lnp.decompose(model, batch, "mse", estimator="exact")
    model.p["gate"].assign(2.0)
    for _ in range(100):
        d = lnp.decompose(model, batch, "mse", estimator="exact")
        if d.probes == 16:
            break
    right(model, batch, d)


@pytest.mark.usefixtures("blind")
def test_what_the_pilot_runs_apart_is_compared():
    wide = lambda p, x: gated(p, x) @ p["v"]
    model, batch = gate(wide, v=normal(2, 30)), batch_of(32, 30)
    lnp.decompose(model, batch, "mse")
    model.p["gate"].assign(2.0)
    d = lnp.decompose(model, batch, "mse", estimator="per_sample", rtol=0.05)
    assert any(LATER in note for note in d.notes), d.notes


@pytest.mark.usefixtures("blind")
def test_what_the_fallback_runs_apart_is_compared():
    def recomputed(p, x):
        h = tf.recompute_grad(lambda x: tf.tanh(x @ p["w"]))(x)
        return h + opened(p["gate"]) * tf.reduce_mean(h, 0)

    model, batch = gate(recomputed, w=normal(3, 3)), batch_of(5, 3)
    lnp.decompose(model, batch, "mse", population=True)
    model.p["gate"].assign(2.0)
    d = lnp.decompose(model, batch, "mse", estimator="exact", population=True)
    assert any(LATER in note for note in d.notes), d.notes
    right(model, batch, d)


def test_a_fallback_whose_gradient_alone_differs():
    """Of a parameter without rules: a gate in a recomputed part, that is hardly open."""

    def recomputed(p, x):
        h = tf.tanh(x @ p["w"])
        return tf.recompute_grad(lambda h: h + opened(p["gate"]) * tf.reduce_mean(h, 0))(h)

    model = Wrapped(recomputed, {"w": normal(3, 2).astype("f"), "gate": np.float32(0.5)})
    batch = tuple(tf.cast(part, tf.float32) for part in batch_of(6))
    assert any("slower" in note for note in lnp.decompose(model, batch, "mse", estimator="exact").notes)
    model.p["gate"].assign(1 + 1e-4)
    assert any(LATER in note for note in lnp.decompose(model, batch, "mse", estimator="exact").notes)


def test_small_gradients_and_outputs_near_zero_are_no_interaction():
    """Numbers that a loss has done with, beside others: rounding is relative to the batch."""
    model = Wrapped(lambda p, x: x @ p["w"] + p["b"], {"w": normal(3, 4).astype("f"), "b": normal(4).astype("f")})
    scale = tf.constant([[1.0], [1e-5], [1e-9], [1e-13], [1e-20], [0.0]])
    x, y = tf.constant(normal(6, 3, seed=1), tf.float32), tf.constant(normal(6, 4, seed=2), tf.float32)
    loss = lambda f, y: tf.reduce_mean(scale[: f.shape[0]] * (f - y) ** 2)
    for _ in range(12):
        d = lnp.decompose(model, (x * scale, y), loss, estimator="exact", population=True)
        assert d.probes == 4, d.notes
