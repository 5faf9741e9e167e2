"""Updates in TensorFlow, by Keras's optimizers, in float64. The oracles are gradients by tf.GradientTape."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import lnp

GENERATOR = np.random.default_rng(0)
INPUTS = tf.constant(GENERATOR.standard_normal((16, 5)))
TARGETS = tf.constant(GENERATOR.integers(3, size=16))
BATCH = (INPUTS, TARGETS)
WEIGHTS = [GENERATOR.standard_normal(shape) / 2 for shape in ((5, 7), (7,), (7, 3))]
OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.125),
    "momentum": lambda: keras.optimizers.SGD(0.125, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "AdamW": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
}


class Network(tf.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.bias, self.head = (tf.Variable(w) for w in WEIGHTS)
        self.calls = tf.Variable(0, trainable=False)

    def __call__(self, x):
        self.calls.assign_add(1)
        return tf.tanh(x @ self.hidden + self.bias) @ self.head


class Dropping(Network):
    """With masks from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = tf.random.Generator.from_seed(3)

    def __call__(self, x):
        hidden = tf.tanh(x @ self.hidden + self.bias)
        return hidden * tf.cast(self.generator.uniform(hidden.shape) > 0.4, x.dtype) @ self.head


def apply(parameters, x):
    return tf.tanh(x @ parameters["layer"][0] + parameters["layer"][1]) @ parameters["head"]


def cross_entropy(logits):
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(TARGETS, logits))


def case(kind):
    """(what lnp gets, its variables, () -> its loss)."""
    if kind == "module":
        model = Network()
        return model, list(model.trainable_variables), lambda: cross_entropy(model(INPUTS))
    hidden, bias, head = (tf.Variable(w) for w in WEIGHTS)
    if kind == "closure":
        function = lambda x: tf.tanh(x @ hidden + bias) @ head
        return (function, [hidden, bias, head]), [hidden, bias, head], lambda: cross_entropy(function(INPUTS))
    tree = {"layer": [hidden, bias], "head": head}
    return (apply, tree), [hidden, bias, head], lambda: cross_entropy(apply(tree, INPUTS))


def inner(gradients, before, after):
    return sum(float(tf.reduce_sum(g * (b - a))) for g, a, b in zip(gradients, before, after, strict=True))


def gradients_of(loss, variables):
    with tf.GradientTape() as tape:
        value = loss()
    return float(value), tape.gradient(value, variables)


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "module") for name in OPTIMIZERS), ("Adam", "closure"), ("Adam", "function")]
)
def test_any_optimizer(name, kind):
    model, variables, loss = case(kind)
    optimizer = OPTIMIZERS[name]()
    optimizer.build(variables)
    for _ in range(2):  # the second step has momentum
        before, start = lnp.snapshot(model), [v.numpy() for v in variables]
        value, gradients = gradients_of(loss, variables)
        rate = sum(float(tf.reduce_sum(g * g)) for g in gradients)
        optimizer.apply(gradients, variables)
        now = [v.numpy() for v in variables]
        taken = lnp.step_taken(before, model, BATCH)
        assert all(map(np.array_equal, now, [v.numpy() for v in variables]))
        assert taken.measured == pytest.approx(float(loss()) - value, rel=1e-9)
        assert taken.predicted == pytest.approx(inner(gradients, start, now), rel=1e-9)
        if name == "SGD":
            assert taken.predicted == pytest.approx(-0.125 * rate, rel=1e-9)


def test_tensors_in_the_place_of_variables():
    tree = {"layer": [tf.constant(WEIGHTS[0]), tf.constant(WEIGHTS[1])], "head": tf.constant(WEIGHTS[2])}
    moved = {"layer": [0.9 * leaf for leaf in tree["layer"]], "head": tree["head"] - 0.1}
    tracker = lnp.Tracker(schedule=1)
    with tracker.step(0, (apply, tree), BATCH) as watched:
        watched.after((apply, moved))
    expected = float(cross_entropy(apply(moved, INPUTS)) - cross_entropy(apply(tree, INPUTS)))
    assert tracker.history["update/measured"][0] == pytest.approx(expected, rel=1e-9)


def test_the_masks_of_a_generator_are_those_of_the_step():
    model = Dropping()
    variables = list(model.trainable_variables)
    before, start = lnp.snapshot(model), [v.numpy() for v in variables]
    value, gradients = gradients_of(lambda: cross_entropy(model(INPUTS)), variables)
    for variable, gradient in zip(variables, gradients, strict=True):
        variable.assign_sub(0.5 * gradient)
    state = model.generator.state.numpy()
    taken = lnp.step_taken(before, model, BATCH)
    assert np.array_equal(model.generator.state.numpy(), state)
    assert taken.predicted == pytest.approx(inner(gradients, start, [v.numpy() for v in variables]), rel=1e-9)
    model.generator.reset_from_seed(3)
    assert taken.measured == pytest.approx(float(cross_entropy(model(INPUTS))) - value, rel=1e-9)


def train(tracker=None):
    model = Network()
    optimizer = OPTIMIZERS["AdamW"]()
    optimizer.build(list(model.trainable_variables))
    losses = []

    @tf.function(jit_compile=True)
    def update():
        with tf.GradientTape() as tape:
            value = cross_entropy(tf.tanh(INPUTS @ model.hidden + model.bias) @ model.head)
        optimizer.apply(tape.gradient(value, model.trainable_variables))
        return value

    for step in range(4):
        if tracker is None:
            losses.append(float(update()))
        else:
            with tracker.step(step, model, BATCH):
                losses.append(float(update()))
    return [*losses, *(v.numpy() for v in (*model.variables, *optimizer.variables))]


def test_a_loop_is_not_changed():
    tracker = lnp.Tracker(schedule=1)
    watched = train(tracker)
    assert all(map(np.array_equal, watched, train()))
    assert tracker.history["update/measured"][:-1] == pytest.approx(np.diff(watched[:4]), rel=1e-9)


@pytest.mark.parametrize("when", ["tracing", "running"])
def test_an_exception_leaves_the_variables(when):
    model = Network()
    before = lnp.snapshot(model)
    for variable in model.trainable_variables:
        variable.assign(variable + 0.1)
    now = [v.numpy() for v in model.variables]

    def broken(outputs, targets):
        if when == "tracing":
            raise RuntimeError("broken")
        return tf.debugging.check_numerics(tf.reduce_mean(outputs) * np.inf, "broken")

    with pytest.raises((RuntimeError, tf.errors.InvalidArgumentError)):
        lnp.step_taken(before, model, BATCH, broken)
    assert all(map(np.array_equal, now, [v.numpy() for v in model.variables]))


def test_what_cannot_be_compared():
    model = Network()
    before = lnp.snapshot(model)
    model.bias = tf.Variable(WEIGHTS[1], trainable=False)
    with pytest.raises(ValueError, match="other trained parameters"):
        lnp.step_taken(before, model, BATCH)
    with pytest.raises(ValueError, match="put back"):
        tf.function(lambda: lnp.snapshot(model) and 0)()
    with pytest.raises(ValueError, match="record of a snapshot"):
        lnp.kernel(before, BATCH)
