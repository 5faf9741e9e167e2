"""Networks and losses with every kind of state in TensorFlow, and all that a training loop with them has."""

from __future__ import annotations

import collections
import random

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

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
