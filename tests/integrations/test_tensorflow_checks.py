"""What the comparison with single samples catches: misread sample axes, wrong rules, samples that interact."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import tensorflow as tf

import lnp
from contract.namespaces import tensorflow
from integrations.tensorflow_reference import dense
from integrations.test_tensorflow_models import Wrapped, agrees, normal, squared
from integrations.test_tensorflow_samples import measured, same, wrapped
from lnp_tensorflow import measurement
from lnp_tensorflow.taps import rules

tensorflow()


def time_major(p, x):
    rows = tf.reshape(tf.transpose(x, (1, 0, 2)), (-1, x.shape[2])) @ p["w"]
    return tf.transpose(tf.reshape(rows, (x.shape[1], x.shape[0], -1)), (1, 0, 2))


def packed(p, x):
    """All rows in an order of their own."""
    rows = tf.reshape(x, (-1, x.shape[2]))
    order = tf.constant(np.random.default_rng(0).permutation(rows.shape[0]))
    mixed = tf.gather(tf.gather(rows, order) @ p["w"], tf.argsort(order))
    return tf.reshape(mixed, (x.shape[0], x.shape[1], -1))


def attention_over_the_batch(p, x):
    y = x[:, 0] @ p["w"]
    return tf.nn.softmax(y @ tf.transpose(y)) @ y


def batch_normalised(p, x):
    y = x[:, 0] @ p["w"]
    mean, variance = tf.nn.moments(y, 0)
    return (y - mean) / tf.sqrt(variance + 1e-3)


def gated(p, x):
    y = x[:, 0] @ p["w"]
    return y + p["gate"] * tf.reduce_mean(y, 0)


WEIGHTS = {"w": normal(3, 4), "o": normal(4, 2)}
MISREAD = {"time major": time_major, "packed rows": packed}
COUPLED = {"batch attention": attention_over_the_batch, "batch norm": batch_normalised, "closed gate": gated}


def given(function):
    values = {"w": normal(3, 2)} | ({"gate": np.zeros(2)} if function is gated else {})
    return Wrapped(function, values), tf.constant(normal(5, 4, 3, seed=1))


@pytest.mark.parametrize("name", MISREAD)
def test_a_misread_sample_axis_is_caught(name):
    model, x = given(MISREAD[name])
    found = measured(model, x)
    same(found, model, x, "float64")
    assert any("its rules differ from single samples" in note and "p.w" in note for note in found["notes"])


@pytest.mark.parametrize("name", COUPLED)
def test_samples_that_interact_are_caught(name):
    model, x = given(COUPLED[name])
    d = lnp.decompose(model, (x, tf.ones_like(model(x))), estimator="per_sample")
    assert d.estimator == "joint"
    assert any("interact" in note for note in d.notes)


@pytest.mark.parametrize("name", MISREAD | COUPLED)
def test_inside_a_function(name):
    """Where nothing can be remembered, misread samples take the general way, and samples that interact give nan."""
    model, x = given((MISREAD | COUPLED)[name])
    y = tf.ones_like(model(x))
    inside = tf.function(lambda x: lnp.decompose(model, (x, y), estimator="exact"), autograph=False)(x)
    if name in COUPLED:
        assert np.isnan(inside.chi_net.numpy())
        return
    outside = lnp.decompose(model, (x, y), estimator="exact", population=True)
    assert inside.chi_net.numpy() == pytest.approx(outside.chi_net, 1e-10)
    assert inside.population.rate_stderr.numpy() == pytest.approx(outside.population.rate_stderr, 1e-10)


def for_so_many(p, x):
    return tf.reshape(tf.reshape(x, (-1, 3)) @ p["w"], (5, 4, 2))


def one_for_each(p, x):
    return x * p["w"][:5, :1, None]


IMPOSSIBLE = {
    "a batch size of its own": (for_so_many, (3, 2), "single samples cannot be run"),
    "a number for each sample": (one_for_each, (5, 1), "single samples cannot be run"),
    "a row for each position": (lambda p, x: tf.reshape(x, (-1, 3)) @ p["w"], (3, 2), "no input runs over the 20"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_networks_that_do_not_run_on_single_samples(name):
    function, shape, note = IMPOSSIBLE[name]
    model, x = Wrapped(function, {"w": normal(*shape)}), tf.constant(normal(5, 4, 3, seed=1))
    y = tf.constant(normal(*model(x).shape, seed=2))
    d = lnp.decompose(model, (x, y), "mse", estimator="exact")
    size = y.shape.num_elements()
    agrees(d, dense(lambda: model(x), [model.p["w"]], squared(y), size), "float64")
    assert d.probes == size
    assert any(note in given for given in d.notes), d.notes
    inside = tf.function(lambda x: lnp.decompose(model, (x, y), "mse", estimator="exact"), autograph=False)(x)
    assert inside.chi_net.numpy() == pytest.approx(d.chi_net, 1e-10)


@tf.custom_gradient
def clipped(x):
    return tf.identity(x), lambda d: tf.clip_by_value(d, -0.6, 0.6)


@tf.custom_gradient
def doubled(x):
    return tf.identity(x), lambda d: 2 * d


@tf.custom_gradient
def normalised(x):
    return tf.identity(x), lambda d: d / tf.norm(d)


@tf.custom_gradient
def pushed(x):
    return tf.identity(x), lambda d: d + 1e-3


def averaging(own):
    """Samples that meet, so that they are never taken apart."""
    return lambda p, x: own(x @ p["w"] + tf.reduce_mean(x @ p["w"], 0))


BENT = [clipped, normalised, pushed]


@pytest.mark.parametrize("own", [*BENT, doubled])
def test_a_backward_pass_that_is_not_linear_is_an_error(own):
    """The cotangents of the comparison have lengths from 0.5 on, and are pulled back shorter and longer, too."""
    model, x = Wrapped(lambda p, x: own(x @ p["w"]), {"w": normal(3, 2)}), tf.constant(normal(5, 3))
    inside = tf.function(lambda x: lnp.decompose(model, (x, tf.ones_like(x[:, :2])), "mse"), autograph=False)(x)
    assert np.isnan(inside.chi_net.numpy()) == (own in BENT)
    together = Wrapped(averaging(own), {"w": normal(3, 2)})
    for network, how in ((model, "auto"), (model, "joint"), (together, "auto")):
        with pytest.raises(ValueError, match="not linear") if own in BENT else contextlib.nullcontext():
            lnp.decompose(network, (x, tf.ones_like(model(x))), "mse", estimator=how)


def test_a_backward_pass_that_bends_later_is_seen_by_the_sample_that_is_looked_at():
    """Where cotangents are as large as those of the comparison were not."""

    @tf.custom_gradient
    def limited(x):
        return tf.identity(x), lambda d: tf.clip_by_value(d, -1e4, 1e4)

    model = Wrapped(lambda p, x: limited(x @ p["w"]) * p["s"], {"w": normal(3, 2), "s": np.ones(())})
    batch = tf.constant(normal(5, 3)), tf.constant(normal(5, 2, seed=1))
    lnp.decompose(model, batch, "mse")
    model.p["s"].assign(1e5)
    with pytest.raises(ValueError, match="not linear"):
        lnp.decompose(model, batch, "mse")


def test_the_population_of_a_network_that_recomputes():
    """Which has no Jacobian-vector products."""
    recomputed, plain = (
        Wrapped(lambda p, x, through=through: through(lambda x: tf.tanh(x @ p["w"]))(x) @ p["o"], WEIGHTS)
        for through in (tf.recompute_grad, lambda function: function)
    )
    batch = tf.constant(normal(14, 3)), tf.constant(normal(14, 2, seed=1))
    found, expected = (lnp.decompose(model, batch, "mse", population=True) for model in (recomputed, plain))
    assert found.population.rate_stderr == pytest.approx(expected.population.rate_stderr, rel=1e-10)
    assert any("slower" in note for note in found.notes)


def test_a_wrong_rule_is_caught(monkeypatch):
    monkeypatch.setitem(
        rules.RULES, "AddV2", lambda *given: rules.Use("dense", (2 * rules._shift(lambda _: 1)(*given).arrays[0],))
    )
    model, x = Wrapped(lambda p, x: x @ p["w"] + p["b"], {"w": normal(3, 2), "b": normal(2)}), tf.constant(normal(5, 3))
    found = measured(model, x)
    same(found, model, x, "float64")
    assert any("p.b (its rules differ" in note and "p.w" not in note for note in found["notes"])


@pytest.fixture
def compared(monkeypatch):
    """Grows by one with each comparison that is run: whether it was one at other parameters."""
    calls = []

    def run(body, plan, given, moving=False):
        calls.extend([moving] if body is measurement._judge else [])
        return original(body, plan, given, moving)

    original = measurement.run_traced
    monkeypatch.setattr(measurement, "run_traced", run)
    return calls


def test_compared_once(compared):
    """Of measurements with other settings and of other kinds, the first compares."""
    model, x = wrapped("layer norm", "float64")
    y = tf.zeros_like(model(x))
    for seed in range(3):
        lnp.decompose(model, (x, y), seed=seed, rtol=0.01 + 0.1 * (seed == 2))
    measured(model, x)
    assert compared == [False, True]


def test_what_is_not_a_number_is_not_remembered(compared):
    model, x = wrapped("layer norm", "float64")
    lnp.decompose(model, (x * float("nan"), tf.zeros_like(model(x))))
    found = measured(model, x)
    same(found, model, x, "float64")
    assert found["cheap"]
    assert compared == [False, False, True]


def test_what_arrives_where_nothing_was_sent_is_caught(monkeypatch):
    """A rule that is right at the samples that are compared, and wrong at the second of twenty."""

    def leaking(op, place, d, samples):
        (gradient,) = rules._shift(lambda _: 1)(op, place, d, samples).arrays
        return rules.Use("dense", (gradient + tf.one_hot(1, samples, dtype=d.dtype)[:, None],))

    monkeypatch.setitem(rules.RULES, "AddV2", leaking)
    model, x = Wrapped(lambda p, x: x + p["b"], {"b": normal(3)}), tf.constant(normal(20, 3))
    found = measured(model, x)
    same(found, model, x, "float64")
    assert any("p.b (its rules differ" in note for note in found["notes"])


def test_overlapping_parts_of_a_weight():
    """Halves along either axis, which share a quarter."""
    model = Wrapped(
        lambda p, x: tf.sin(x @ tf.split(p["w"], 2, axis=1)[0]) + tf.cos(x[:, :2] @ tf.split(p["w"], 2)[0])[:, :2],
        {"w": normal(4, 4)},
    )
    x = tf.constant(normal(5, 4, seed=1))
    found = measured(model, x)
    same(found, model, x, "float64")
    assert any("p.w (several uses)" in note for note in found["notes"])


def test_a_backward_pass_that_clips_one_sample_alone():
    """All others have hardly any loss gradient, whichever of them is looked at."""
    rng = np.random.default_rng(0)
    x, w, v = rng.normal(size=(12, 3)), rng.normal(size=(3, 4)), rng.normal(size=(4, 2))

    @tf.custom_gradient
    def clipped(h):
        return tf.identity(h), lambda d: tf.clip_by_value(d, tf.constant(-2.0, d.dtype), tf.constant(2.0, d.dtype))

    hidden, head = tf.Variable(w), tf.Variable(0.01 * v)
    model = (lambda inputs: clipped(tf.tanh(inputs @ hidden)) @ head, [hidden, head])
    lnp.decompose(model, (tf.constant(x), tf.zeros((12, 2), tf.float64)), "mse")
    head.assign(30 * v)
    targets = np.tanh(x @ w) @ (30 * v) + 1e-6 * rng.normal(size=(12, 2))
    targets[7] += 100
    for _ in range(4):
        with pytest.raises(ValueError, match="not linear"):
            lnp.decompose(model, (tf.constant(x), tf.constant(targets)), "mse")
