"""Training loops that are watched, beside the same loops unwatched: bit by bit the same in everything that a loop has.

Networks and losses with every kind of state, alone and as hypothesis puts them together. Each loop makes three steps.
"""

from __future__ import annotations

import collections
import random

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies
from tensorflow.python.eager import context

import lnp
import lnp_tensorflow
from contract.namespaces import tensorflow

tensorflow()
STEPS = 3
TOTAL = 0
"""Calls of the networks that count in a global."""


class Helper:
    """An object of the user's own, without variables."""

    def __init__(self):
        self.calls, self.last = 0, None


class Shared:
    """Counts for all networks."""

    calls = 0


def counted(net, h):
    net.calls += 1
    return h * (1.0 + 0.01 * net.calls)


def appended(net, h):
    net.seen.append(h)
    return h + 0.01 * tf.reduce_mean(net.seen[0])


def in_dictionary(net, h):
    net.stats["last"] = tf.reduce_mean(h, 0)
    net.stats["count"] = net.stats.get("count", 0) + 1
    return h * (1.0 + 0.01 * net.stats["count"])


def in_nested(net, h):
    net.nested["a"][0].append(len(net.nested["a"][0]))
    net.nested["b"].add(len(net.nested["a"][0]))
    net.queue.append(h)
    return h + 0.01 * sum(net.nested["a"][0])


def in_helper(net, h):
    net.helper.calls += 1
    net.helper.last = h
    return h * (1.0 + 0.01 * net.helper.calls)


def in_global(net, h):
    global TOTAL
    TOTAL += 1
    Shared.calls += 2
    return h * (1.0 + 0.01 * TOTAL + 0.001 * Shared.calls)


def in_array(net, h):
    net.array += 1.0
    return h + tf.constant(net.array)


def made_lazily(net, h):
    if not hasattr(net, "made"):
        net.made = [tf.reduce_mean(h, 0, keepdims=True)]
    return h - 0.1 * net.made[0]


def normalised(net, h):
    mean, variance = tf.nn.moments(h, 0)
    net.mean.assign(0.9 * net.mean + 0.1 * mean)
    net.count.assign_add(1)
    return (h - mean) / tf.sqrt(variance + 1e-3) + 0.01 * net.mean


def spectral(net, h):
    u = tf.math.l2_normalize(tf.linalg.matvec(net.s, net.u))
    net.u.assign(tf.math.l2_normalize(tf.linalg.matvec(net.s, u, transpose_a=True)))
    net.s.assign(net.s / tf.tensordot(u, tf.linalg.matvec(net.s, net.u), 1))
    return h @ net.s


def generated(net, h):
    return h + 0.1 * net.generator.normal(h.shape, dtype=h.dtype)


def compiled_with_draws(net, h):
    return net.inner(h)


def numpy_noise(net, h):
    return h * (1.0 + 0.1 * np.random.standard_normal()) + 0.1 * net.numpy_generator.standard_normal()  # noqa: NPY002


def scaled(h):
    return h * np.random.standard_normal()  # noqa: NPY002


class Net(tf.Module):
    """Two layers, and between them what the features do."""

    def __init__(self, features):
        super().__init__()
        draw = np.random.default_rng(0).standard_normal
        self.features = features
        self.w, self.v = tf.Variable(draw((4, 3))), tf.Variable(draw((3, 2)))
        self.s, self.u = tf.Variable(draw((3, 3))), tf.Variable(draw(3), trainable=False)
        self.mean, self.count = tf.Variable(np.zeros(3), trainable=False), tf.Variable(0, trainable=False)
        self.calls, self.seen, self.stats, self.helper = 0, [], {}, Helper()
        self.nested, self.queue, self.array = {"a": [[]], "b": set()}, collections.deque(maxlen=2), np.zeros(3)
        self.generator, self.numpy_generator = tf.random.Generator.from_seed(1), np.random.default_rng(2)
        self.traces = []

    @tf.function
    def inner(self, h):
        self.traces.append(len(self.traces))
        return tf.nn.dropout(h, 0.3)

    def __call__(self, x):
        h = tf.tanh(x @ self.w)
        for feature in self.features:
            h = FEATURES[feature](self, h)
        return h @ self.v


FEATURES = {
    "counter": counted, "list": appended, "dictionary": in_dictionary, "nested containers": in_nested,
    "object": in_helper, "global and class": in_global, "array in place": in_array, "made lazily": made_lazily,
    "batch norm": normalised, "spectral norm": spectral, "generator": generated,
    "dropout": lambda net, h: tf.nn.dropout(h, 0.4),
    "seeded dropout": lambda net, h: tf.nn.dropout(h, 0.4, seed=3),
    "compiled, with draws": compiled_with_draws, "NumPy": numpy_noise,
    "Python": lambda net, h: h * random.choice([0.5, 1.0, 2.0]),
    "py_function": lambda net, h: tf.ensure_shape(tf.numpy_function(scaled, [h], h.dtype), h.shape),
}  # fmt: skip


class Centred:
    """A loss with a moving centre, a list of what it has seen, and numbers that it draws."""

    def __init__(self, kind):
        self.kind, self.centre, self.seen = kind, tf.Variable(np.zeros(2)), []

    def __call__(self, outputs, targets):
        value = (outputs - targets) ** 2
        if self.kind == "moving":
            value = (outputs - targets - self.centre) ** 2
            self.centre.assign(0.9 * self.centre + 0.1 * tf.reduce_mean(outputs, 0))
        elif self.kind == "list":
            self.seen.append(outputs)
            value = value * (1.0 + 0.1 * len(self.seen))
        elif self.kind == "drawing":
            value = value * tf.random.uniform(value.shape, dtype=value.dtype)
        elif self.kind == "NumPy":
            value = value * np.random.standard_normal() ** 2  # noqa: NPY002
        return tf.reduce_mean(value)


LOSSES = ("moving", "list", "drawing", "NumPy")


def described(value, seen):
    """Everything below a value, as plain data; what comes again is named by its number."""
    if isinstance(value, tf.Variable) or tf.is_tensor(value):
        assert hasattr(value, "numpy"), f"symbolic: {value}"
        return value.numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = len(seen)
    if isinstance(value, collections.abc.Mapping):
        return {key: described(child, seen) for key, child in value.items()}
    if isinstance(value, list | tuple | collections.deque):
        return [described(child, seen) for child in value]
    if isinstance(value, set):
        return sorted(value)
    if isinstance(value, tf.random.Generator):
        return described(value.state, seen)
    own = {key: child for key, child in vars(value).items() if not key.startswith("_self_")}
    return type(value).__name__, [(key, described(child, seen)) for key, child in own.items()]


def everything(model, loss, momenta, kept):
    states = random.getstate(), repr(np.random.get_state()), context.context()._rng.getstate()  # noqa: NPY002
    held = [described(thing, {}) for thing in (model, loss, momenta, kept)]
    return *held, TOTAL, Shared.calls, states, tf.random.normal((3,)).numpy().tobytes()


def fresh(features, kind):
    global TOTAL
    TOTAL, Shared.calls = 0, 0
    tf.random.set_seed(1)
    tf.random.get_global_generator().reset_from_seed(4)
    np.random.seed(2)  # noqa: NPY002
    random.seed(3)
    model = Net(features)
    return model, Centred(kind), [tf.Variable(tf.zeros_like(v)) for v in model.trainable_variables]


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


@pytest.mark.parametrize("way", ["value_and_grad", "observe"])
@pytest.mark.parametrize("feature", ["plain", *FEATURES])
def test_networks(feature, way):
    agree(way, () if feature == "plain" else (feature,))


@pytest.mark.parametrize("feature", ["plain", "dictionary", "object", "batch norm", "spectral norm", "generator"])
def test_updates(feature):
    agree("step", () if feature == "plain" else (feature,))


@pytest.mark.parametrize("way", ["value_and_grad", "observe", "step"])
@pytest.mark.parametrize("kind", LOSSES)
def test_losses(kind, way):
    agree(way, ("batch norm",), kind)


@hypothesis.settings(max_examples=6, deadline=None, derandomize=True, database=None)
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
