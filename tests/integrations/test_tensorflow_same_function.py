"""Every pass of one measurement is the same function, the loss included; else the samples are not taken apart."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

import lnp
from contract.namespaces import tensorflow
from integrations.tensorflow_stateful import LOSSES, Centred, Net, described
from integrations.test_tensorflow_models import Wrapped, normal
from integrations.test_tensorflow_undisturbed import applied, taped
from lnp_tensorflow import measurement

tensorflow()
X, Y = tf.constant(normal(6, 4)), tf.constant(normal(6, 2, seed=1))


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_is_evaluated_again_as_it_was(kind):
    """To first order: with other random numbers, or a state that has moved on, it would differ by parts of itself."""
    model, loss, step = Net(()), Centred(kind), 1e-6
    before = lnp.snapshot(model)
    change = lnp.measured_loss_change(model, (X, Y), loss, learning_rate=step)
    d = lnp.decompose(model, (X, Y), loss)
    if kind != "drawing":  # one measurement's numbers are not those of another
        assert change == pytest.approx(-step * d.rate, rel=1e-4)
    assert -1e-3 < change < 0
    assert any("loss draws" in note for note in d.notes) == (kind != "list"), d.notes
    _, gradients = taped(model, Centred(""), X, Y)
    small = [None if g is None else step * g for g in gradients]
    applied(model, [tf.Variable(tf.zeros_like(v)) for v in model.trainable_variables], small)
    taken = lnp.step_taken(before, model, (X, Y), loss)
    assert taken.measured == pytest.approx(taken.predicted, rel=1e-3)


@pytest.mark.parametrize("feature", ["batch norm", "generator", "dropout", "list", "counter", "NumPy", "Python"])
def test_a_network_is_evaluated_again_as_it_was(feature):
    model = Net((feature,))
    change = lnp.measured_loss_change(model, (X, Y), "mse", learning_rate=1e-6)
    assert -1e-4 < change < 0


def test_what_python_draws_is_drawn_anew_for_each_measurement():
    """The numbers that the step will draw: those that are in traced code are of another one."""
    model = Wrapped(lambda p, x: x @ p["w"] * np.random.standard_normal(), {"w": normal(4, 2)})  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    loss = Centred("")
    for _ in range(2):
        d = lnp.decompose(model, (X, Y), loss, population=False)
        value, _ = taped(model, loss, X, Y)
        assert d.loss == pytest.approx(float(value), rel=1e-12)


def test_what_python_objects_hold_is_part_of_the_model():
    model, loss = Net(("nested containers",)), Centred("list")
    found = []
    for _ in range(2):
        found.append(lnp.decompose(model, (X, Y), loss, population=False).loss)
        model.nested["a"][0].append(50)
        found.append(lnp.decompose(model, (X, Y), loss, population=False).loss)
        loss.seen.append(0)
    assert len(set(found)) == 4


def test_another_function_is_another_model():
    model = Wrapped(lambda p, x: x @ p["w"], {"w": normal(4, 2)})
    linear = lnp.decompose(model, (X, Y), "mse").loss
    model.function = lambda p, x: 2 * (x @ p["w"])
    assert lnp.decompose(model, (X, Y), "mse").loss != linear


def rarely(p, x):
    """Drops a path so rarely that no comparison of a few samples will see it."""
    kept = tf.cast(tf.random.uniform((x.shape[0], 1)) > 1e-6, x.dtype)
    return tf.tanh(x @ p["w"]) * kept


def seeded(p, x):
    """The same for all samples."""
    return tf.tanh(x @ (p["w"] + 0.1 * tf.random.stateless_normal((4, 5), (1, 2), dtype=x.dtype)))


@pytest.mark.parametrize("function", [rarely, seeded])
def test_samples_of_a_network_that_draws(function):
    model = Wrapped(function, {"w": normal(4, 5)})
    d = lnp.decompose(model, (tf.constant(normal(6, 4)), tf.constant(normal(6, 5))), "mse", estimator="exact")
    assert (d.probes == 30) == any("draws random numbers" in note for note in d.notes) == (function is rarely)


def even(p, x):
    assert x.shape[0] % 2 == 0, "pairs"
    return tf.tanh(x @ p["w"])


def checked(p, x):
    """An error in the graph, for single samples alone."""
    size = tf.shape(x)[0] + tf.cast(0 * tf.reduce_sum(x), tf.int32)
    with tf.control_dependencies([tf.debugging.Assert(size > 2, ["few"])]):
        return tf.tanh(x @ p["w"])


@pytest.mark.parametrize("function", [even, checked])
def test_a_network_that_fails_on_some_samples_is_measured_jointly(function):
    model = Wrapped(function, {"w": normal(4, 2)})
    d = lnp.decompose(model, (X, Y), "mse", estimator="exact")
    assert d.probes == 12
    assert any("single samples cannot be run" in note for note in d.notes), d.notes


def test_a_network_that_fails_on_a_subset_of_samples():
    """Single samples pass, and the few that a pilot draws do not."""

    def alone_or_all(p, x):
        assert x.shape[0] in (1, 256), "neither one nor all"
        return tf.tanh(x @ p["w"])

    model = Wrapped(alone_or_all, {"w": normal(4, 60)})
    batch = tf.constant(normal(256, 4)), tf.constant(normal(256, 60, seed=1))
    d = lnp.decompose(model, batch, "mse", rtol=0.001)
    assert any("neither one nor all" in note for note in d.notes), d.notes
    inside = tf.function(lambda: lnp.decompose(model, batch, "mse", rtol=0.001), autograph=False)()
    assert inside.chi_net.numpy() == pytest.approx(d.chi_net, rel=1e-6)


@pytest.mark.parametrize("error", [AssertionError, KeyError])
def test_a_loss_that_fails_on_some_samples(error):
    def whole(outputs, targets):
        if outputs.shape[0] != 6 or not tf.is_tensor(targets):
            raise error("another batch")
        return tf.reduce_mean((outputs - targets) ** 2)

    big = tf.constant(normal(6, 2))
    assert lnp.decompose(Net(()), (X, big), whole).chi_net > 0
    assert lnp.decompose(Net(()), (tf.tile(X, [2, 1])[:6], big), whole).chi_net > 0


def test_an_untraced_record_leaves_no_trace():
    """Eager operations draw their seeds from a sequence that is the user's."""
    model = Net(("dropout", "batch norm", "list", "generator"))
    tf.random.set_seed(1)
    states = lambda: (described(model, {}), context.context()._rng.getstate())
    before = states()
    lnp.kernel(model, (X, Y), "mse")
    assert states() == before


def test_the_seeds_of_eager_operations_are_found(monkeypatch):
    monkeypatch.setattr(context.context(), "_rng", None)
    tf.random.set_seed(1)
    monkeypatch.setattr(context.context(), "_rng", None)
    with pytest.raises(RuntimeError, match="seeds of eager operations"):
        lnp.decompose(Net(()), (X, Y), "mse")


def test_comparisons_are_remembered_although_python_draws(monkeypatch):
    runs, run = [], measurement.run_traced
    monkeypatch.setattr(measurement, "run_traced", lambda body, *a: runs.append(body) or run(body, *a))
    model = Net(("NumPy",))
    for _ in range(3):
        lnp.decompose(model, (X, Y), "mse", population=False)
    assert runs.count(measurement._judge) == 1
