"""Training loops that are watched, beside the same loops unwatched: bit by bit the same in everything that a loop has.

Networks and losses with every kind of state, alone and as hypothesis puts them together. Each loop makes two steps.
"""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies

import lnp
import lnp_tensorflow
from contract.namespaces import tensorflow
from integrations.tensorflow_stateful import FEATURES, LOSSES, everything, fresh

tensorflow()
STEPS = 2


def taped(model, loss, x, y):
    with tf.GradientTape() as tape:
        value = loss(model(x), y)
    return value, tape.gradient(value, model.trainable_variables)


def applied(model, momenta, gradients):
    for variable, momentum, gradient in zip(model.trainable_variables, momenta, gradients, strict=True):
        if gradient is not None:
            momentum.assign(0.9 * momentum + gradient)
            variable.assign_sub(0.05 * momentum)


def loop(way, features, kind):
    model, loss, momenta = fresh(features, kind)
    options = {"max_probes": 2, "population": None if kind else False}
    tracker = lnp.Tracker(schedule=1, loss=loss, on_error="raise", **options)
    kept = []
    for step in range(STEPS):
        x, y = (tf.constant(np.random.default_rng(step).standard_normal((6, k))) for k in (4, 2))
        if way == "value_and_grad":
            (value, d), gradients = lnp_tensorflow.value_and_grad(model, (x, y), loss, seed=step, **options)
            tracker.record(step, d)
        elif way == "observe":
            tracker.observe(step, model, (x, y))
        if way == "step":
            with tracker.step(step, model, (x, y)):
                value, gradients = taped(model, loss, x, y)
                applied(model, momenta, gradients)
        else:
            if way != "value_and_grad":
                value, gradients = taped(model, loss, x, y)
            applied(model, momenta, gradients)
        kept += [value, *gradients]
    if way != "plain":
        assert len(tracker.history["chi_net"]) == STEPS
        assert np.all(np.isfinite(tracker.history["chi_net"]))
    return everything(model, loss, momenta, kept)


def agree(way, features, kind=""):
    plain, watched = loop("plain", features, kind), loop(way, features, kind)
    for name, a, b in zip(("model", "loss", "momenta", "steps", "global", "class", "random", "drawn"), plain, watched):  # noqa: B905
        assert a == b, name


OBSERVED = ("plain", "nested containers", "made lazily", "batch norm", "dropout", "compiled, with draws")
"""What is measured outside of the step, as in it: one of each kind of state."""


@pytest.mark.parametrize(
    ("feature", "way"),
    [*((name, "value_and_grad") for name in ("plain", *FEATURES)), *((name, "observe") for name in OBSERVED)],
)
def test_networks(feature, way):
    agree(way, () if feature == "plain" else (feature,))


@pytest.mark.parametrize("feature", ["plain", "dictionary", "object", "batch norm", "spectral norm", "generator"])
def test_updates(feature):
    agree("step", () if feature == "plain" else (feature,))


@pytest.mark.parametrize(
    ("kind", "way"), [*((kind, "value_and_grad") for kind in LOSSES), ("moving", "observe"), ("list", "step")]
)
def test_losses(kind, way):
    agree(way, ("batch norm",), kind)


@hypothesis.settings(max_examples=3, derandomize=True, database=None)
@hypothesis.given(
    way=strategies.sampled_from(["value_and_grad", "observe"]),
    features=strategies.lists(strategies.sampled_from(sorted(FEATURES)), min_size=2, max_size=3, unique=True),
    kind=strategies.sampled_from(["", *LOSSES]),
)
def test_drawn(way, features, kind):
    agree(way, tuple(features), kind)


def test_a_loop_that_is_disturbed_would_be_seen(monkeypatch):
    """By the least: a measurement that leaves one number in a list."""
    observe = lnp.Tracker.observe

    def careless(self, step, model, batch):
        model.nested["a"][0].append(0)
        return observe(self, step, model, batch)

    monkeypatch.setattr(lnp.Tracker, "observe", careless)
    with pytest.raises(AssertionError, match="model"):
        agree("observe", ())


@pytest.mark.parametrize("where", ["network", "loss"])
def test_an_exception(where):
    """In the middle of a measurement, after everything was written to."""
    features = ("list", "dictionary", "nested containers", "object", "batch norm", "array in place", "NumPy")
    x, y = (tf.constant(np.random.default_rng(0).standard_normal((6, k))) for k in (4, 2))

    def state(fail):
        model, loss, momenta = fresh(features, "moving")

        def failing_forward(model, x):
            outputs = model(x)
            raise RuntimeError("from the network") if where == "network" else None
            return outputs

        def failing_loss(outputs, targets):
            loss(outputs, targets)
            raise RuntimeError("from the loss")

        chosen = failing_loss if where == "loss" else loss
        forward = failing_forward if where == "network" else None
        if fail:
            with pytest.raises(RuntimeError, match=f"from the {where}"):
                lnp_tensorflow.value_and_grad(model, (x, y), chosen, forward=forward)
        return everything(model, loss, momenta, [])

    assert state(True) == state(False)


class Unbuilt(tf.Module):
    """Makes a layer at its first call."""

    def __init__(self):
        super().__init__()
        self.w, self.head = tf.Variable(np.ones((4, 3))), None

    def __call__(self, x):
        if self.head is None:
            self.head = tf.Variable(tf.random.normal((3, 2), dtype=x.dtype))
        return x @ self.w @ self.head


def test_a_network_that_is_not_built_is_refused():
    x, y = (tf.constant(np.random.default_rng(0).standard_normal((6, k))) for k in (4, 2))
    made = []
    for measured in (False, True):
        tf.random.set_seed(1)
        model = Unbuilt()
        if measured:
            with pytest.raises(ValueError, match="not built yet"):
                lnp.decompose(model, (x, y))
            assert model.head is None
        model(x)
        made.append(model.head.numpy().tobytes())
        assert lnp.decompose(model, (x, y)).chi_net > 0
    assert made[0] == made[1]
