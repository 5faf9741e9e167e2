"""Updates of Keras models, on each framework. The oracle is the model itself, and its gradient by tf.GradientTape where
Keras runs on TensorFlow.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest

import lnp

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in Keras, on PyTorch
DTYPE, TOLERANCE = ("float64", 1e-9) if keras.backend.backend() == "tensorflow" else ("float32", 1e-3)
"""Keras rounds to float32 on JAX and PyTorch: a change of 0.01 in a loss of 1 is then known to about 1e-5."""
GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.standard_normal((16, 5)).astype(DTYPE)
TARGETS = GENERATOR.standard_normal((16, 3)).astype(DTYPE)
BATCH = (INPUTS, TARGETS)
OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.125),
    "momentum": lambda: keras.optimizers.SGD(0.125, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "AdamW": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
}
JIT = keras.backend.backend() != "torch"
ON_TENSORFLOW = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the oracle is tf.GradientTape")


def network(*middle, seed=1):
    keras.utils.set_random_seed(seed)
    dense = lambda width: keras.layers.Dense(width, dtype=DTYPE)
    layers = [dense(7), *middle, keras.layers.Activation("tanh", dtype=DTYPE), dense(3)]
    return keras.Sequential([keras.Input((5,), dtype=DTYPE), *layers])


def compiled(name, *middle, jit=False):
    model = network(*middle)
    model.compile(OPTIMIZERS[name](), keras.losses.MeanSquaredError(dtype=DTYPE), jit_compile=jit)
    return model


def numbers(variables):
    return [keras.ops.convert_to_numpy(v.value).copy() for v in variables]


def loss_now(model):
    """In training mode, with everything that the pass writes put back."""
    before = numbers(model.variables)
    away = keras.ops.subtract(model(INPUTS, training=True), keras.ops.convert_to_tensor(TARGETS))
    value = keras.ops.convert_to_numpy(keras.ops.mean(keras.ops.square(away)))
    for variable, number in zip(model.variables, before, strict=True):
        variable.assign(number)
    return float(value)


def gradients_of(model):
    import tensorflow as tf

    before = numbers(model.non_trainable_variables)
    with tf.GradientTape() as tape:
        value = tf.reduce_mean((model(INPUTS, training=True) - TARGETS) ** 2)
    for variable, number in zip(model.non_trainable_variables, before, strict=True):
        variable.assign(number)
    return [gradient.numpy() for gradient in tape.gradient(value, [v.value for v in model.trainable_variables])]


def inner(gradients, before, after):
    return sum(float(np.sum(g * (b - a))) for g, a, b in zip(gradients, before, after, strict=True))


def step_taken(before, model, **options):
    """With everything of the model as it was."""
    now = numbers(model.variables)
    taken = lnp.step_taken(before, model, BATCH, "mse", **options)
    assert all(map(np.array_equal, now, numbers(model.variables)))
    return taken


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(name):
    model = compiled(name)
    for _ in range(2):  # the second step has momentum
        value, before, start = loss_now(model), lnp.snapshot(model), numbers(model.trainable_variables)
        gradients = gradients_of(model) if keras.backend.backend() == "tensorflow" else None
        rate = lnp.decompose(model, BATCH, "mse").rate if name == "SGD" else None
        model.train_on_batch(*BATCH)
        taken = step_taken(before, model)
        assert taken.measured == pytest.approx(loss_now(model) - value, rel=TOLERANCE)
        if gradients is not None:
            expected = inner(gradients, start, numbers(model.trainable_variables))
            assert taken.predicted == pytest.approx(expected, rel=TOLERANCE)
        if rate is not None:
            assert taken.predicted == pytest.approx(-0.125 * rate, rel=TOLERANCE)


@ON_TENSORFLOW
def test_coupled_batch_normalisation():
    model = compiled("SGD", keras.layers.BatchNormalization(dtype=DTYPE))
    value, before, start = loss_now(model), lnp.snapshot(model), numbers(model.trainable_variables)
    gradients = gradients_of(model)
    model.train_on_batch(*BATCH)
    taken = step_taken(before, model, batch_statistics="coupled")
    assert taken.measured == pytest.approx(loss_now(model) - value, rel=1e-9)
    assert taken.predicted == pytest.approx(inner(gradients, start, numbers(model.trainable_variables)), rel=1e-9)
    frozen = step_taken(before, model)
    assert frozen.predicted != pytest.approx(taken.predicted, rel=1e-3)


@ON_TENSORFLOW
def test_the_masks_are_those_of_the_step():
    model = compiled("SGD", keras.layers.Dropout(0.4, dtype=DTYPE))  # not by XLA, which draws others
    value, before, start = loss_now(model), lnp.snapshot(model), numbers(model.trainable_variables)
    gradients, seeds = gradients_of(model), numbers(model.non_trainable_variables)
    model.train_on_batch(*BATCH)
    assert not all(map(np.array_equal, seeds, numbers(model.non_trainable_variables)))
    taken = step_taken(before, model)
    now = numbers(model.trainable_variables)
    assert inner([-0.125 * g for g in gradients], start, now) == pytest.approx(
        sum(float(np.sum((b - a) ** 2)) for a, b in zip(start, now, strict=True)), rel=1e-9
    )  # the oracle's masks are those of the step too
    assert taken.predicted == pytest.approx(inner(gradients, start, now), rel=1e-9)
    for variable, number in zip(model.non_trainable_variables, seeds, strict=True):
        variable.assign(number)
    assert taken.measured == pytest.approx(loss_now(model) - value, rel=1e-9)


def train(tracker=None):
    model = compiled("AdamW", jit=JIT)
    losses = []
    for step in range(4):
        if tracker is None:
            losses.append(float(model.train_on_batch(*BATCH)))
        else:
            with tracker.step(step, model, BATCH):
                losses.append(float(model.train_on_batch(*BATCH)))
    return [*losses, *numbers(model.variables), *numbers(model.optimizer.variables)]


def test_a_loop_is_not_changed():
    tracker = lnp.Tracker(schedule=1, loss="mse")
    assert all(map(np.array_equal, train(tracker), train()))
    assert tracker.history["update/predicted"] == pytest.approx(tracker.history["update/measured"], rel=0.3)


def test_an_exception_leaves_the_variables():
    model = network()
    before = lnp.snapshot(model)
    for variable in model.trainable_variables:
        variable.assign(variable + 0.1)
    now = numbers(model.variables)

    def broken(outputs, targets):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        lnp.step_taken(before, model, BATCH, broken)
    assert all(map(np.array_equal, now, numbers(model.variables)))


def test_what_cannot_be_compared():
    before = lnp.snapshot(network())
    with pytest.raises(ValueError, match="other trained variables"):
        lnp.step_taken(before, network(keras.layers.Dense(2, dtype=DTYPE)), BATCH)
    with pytest.raises(ValueError, match="not built"):
        lnp.snapshot(keras.Sequential([keras.layers.Dense(2)]))
