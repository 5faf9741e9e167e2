"""What is measured is what `fit` minimises: with plain SGD, the rate is the squared length of one real step over its
learning rate.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import lnp
from integrations.keras_reference import BACKEND, numpy

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # inside Keras
    pytest.mark.filterwarnings("ignore:A layer's `trainable` state has changed:UserWarning"),
]
R = np.random.default_rng(0)
X, Y = R.standard_normal((6, 4)).astype("float32"), R.standard_normal((6, 2)).astype("float32")
W = np.array([1.0, 0.0, 2.0, 0.5, 1.0, 3.0], "float32")
MSE = keras.losses.MeanSquaredError
RATE = 0.5


class Kl(layers.Layer):
    def call(self, x):
        self.add_loss(3 * ops.mean(x**2))
        return x


class Penalised(keras.Sequential):
    """Its loss reads a weight beside the outputs."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean((y_pred - ops.convert_to_tensor(y)) ** 2) + ops.sum(self.layers[0].kernel.value ** 2)


class Doubled(keras.Sequential):
    """An override without `training`, of what Keras computes."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return 2 * super().compute_loss(x, y, y_pred, sample_weight)


class Logged(keras.Sequential):
    """A train_step of the user's own."""

    def train_step(self, *given):
        return super().train_step(*given)


def net(*middle, cls=keras.Sequential, **first):
    return cls([keras.Input((4,)), layers.Dense(3, "tanh", **first), *middle, layers.Dense(2)])


def two_outputs():
    inputs = keras.Input((4,))
    hidden = layers.Dense(3, "tanh", kernel_regularizer="l2")(inputs)
    return keras.Model(inputs, [layers.Dense(2)(hidden), layers.Dense(1)(hidden)])


def masked():
    return keras.Sequential([keras.Input((3,), dtype="int32"), layers.Embedding(5, 4, mask_zero=True), layers.Dense(2)])


def reconstructing():
    inputs = keras.Input((4,))

    class Reconstruction(layers.Layer):
        def call(self, pair):
            self.add_loss(ops.mean((pair[0] - pair[1]) ** 2))
            return pair[0]

    return keras.Model(inputs, Reconstruction()([layers.Dense(4)(inputs), inputs]))


IDS, AFTER = np.array([[1, 2, 0], [3, 0, 0]], "int32"), np.ones((2, 3, 2), "float32")
SCALED = lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(RATE), initial_scale=64.0)
PENALTY = keras.regularizers.L2(0.3)
WHOLE, OUTPUTS = True, False
CASES = {
    "sum": (net, {"loss": MSE(reduction="sum")}, (X, Y), OUTPUTS),
    "weights": (net, {"loss": MSE()}, (X, Y, W), OUTPUTS),
    "function": (net, {"loss": lambda y, f: ops.mean((f - y) ** 4, axis=-1), "loss_weights": 0.7}, (X, Y, W), OUTPUTS),
    "scaled": (net, {"loss": "mse", "optimizer": SCALED}, (X, Y), OUTPUTS),
    "compiled step": (net, {"loss": "mse", "run_eagerly": False}, (X, Y), OUTPUTS),
    "mask": (masked, {"loss": MSE()}, (IDS, AFTER), OUTPUTS),
    "own loss": (lambda: net(cls=Doubled), {"loss": "mse"}, (X, Y), OUTPUTS),
    "two outputs": (two_outputs, {"loss": ["mse", "mae"], "loss_weights": [1.0, 0.3]}, (X, [Y, Y[:, :1]]), WHOLE),
    "regulariser": (lambda: net(kernel_regularizer=PENALTY, bias_regularizer="l1"), {"loss": "mse"}, (X, Y), WHOLE),
    "activity": (lambda: net(activity_regularizer=PENALTY), {"loss": "mse"}, (X, Y), WHOLE),
    "add_loss": (lambda: net(layers.Dropout(0.4, seed=1), Kl()), {"loss": "mse"}, (X, Y), WHOLE),
    "penalty in the loss": (lambda: net(cls=Penalised), {}, (X, ops.convert_to_tensor(Y)), WHOLE),
    "own loss, regularised": (lambda: net(cls=Doubled, kernel_regularizer=PENALTY), {"loss": "mse"}, (X, Y), WHOLE),
    "add_loss alone": (reconstructing, {}, (X,), OUTPUTS),
}  # fmt: skip
if BACKEND == "torch":
    del CASES["add_loss"]  # dropout draws from the global generator there
AGAIN = ("sum", "scaled", "weights", "mask") if BACKEND != "tensorflow" else ()
"""Say the same on each framework."""


def made(name):
    keras.utils.set_random_seed(1)
    build, compiled, batch, _ = CASES[name]
    model = build()
    optimizer = compiled.get("optimizer", lambda: keras.optimizers.SGD(RATE))()
    model.compile(**{"run_eagerly": True, **compiled, "optimizer": optimizer})
    return model, batch


def stepped(model, batch):
    """||update||^2 / lr^2 of one step of Keras's own, and the loss that it reports."""
    before = [numpy(v.value) for v in model.trainable_variables]
    given = dict(zip(("x", "y", "sample_weight"), batch, strict=False))
    value = model.train_on_batch(**given, return_dict=True)["loss"]
    after = [numpy(v.value) for v in model.trainable_variables]
    return sum(np.sum((a - b) ** 2) for a, b in zip(after, before, strict=True)) / RATE**2, value


@pytest.mark.parametrize("name", [name for name in CASES if name not in AGAIN])
def test_rate_of_a_real_step(name):
    model, batch = made(name)
    x, y, *weight = (*batch, None)[:2] if len(batch) == 1 else batch
    for _ in range(2):  # before the first step, and after it
        d = lnp.decompose(model, (x, y, *weight))
        whole = CASES[name][3]
        assert (d.total is not None) == any("do not come from the outputs" in note for note in d.notes) == whole
        rate, loss = stepped(model, batch)
        said = d.total if whole else d
        assert said.rate == pytest.approx(rate, rel=1e-3 if name == "scaled" else 1e-4)
        if name != "two outputs" and model.optimizer.iterations == 1:  # Keras may report the mean of what it has seen
            assert said.loss == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.skipif(BACKEND == "torch", reason="accumulated there in the same way as on JAX")
def test_accumulated_gradients():
    keras.utils.set_random_seed(1)
    model = net()
    model.compile(keras.optimizers.SGD(RATE, gradient_accumulation_steps=2), "mse", run_eagerly=True)
    d = lnp.decompose(model, (X, Y))
    before = [numpy(v.value) for v in model.trainable_variables]
    for _ in range(2):
        model.train_on_batch(X, Y)
    moved = sum(np.sum((numpy(v.value) - b) ** 2) for v, b in zip(model.trainable_variables, before, strict=True))
    assert d.rate == pytest.approx(moved / RATE**2, rel=1e-4)


def test_flags_that_change_after_compile():
    """On TensorFlow a compiled step goes on with what was trainable when it was traced."""
    keras.utils.set_random_seed(1)
    model = net()
    model.compile(keras.optimizers.SGD(RATE), "mse")
    model.layers[0].trainable = False
    frozen = lnp.decompose(model, (X, Y))
    rate, _ = stepped(model, (X, Y))
    assert frozen.rate == pytest.approx(rate, rel=1e-4)
    if BACKEND == "jax":
        return  # where Keras refuses to go on after a second change
    model.compile(keras.optimizers.SGD(RATE), "mse")
    model.layers[0].trainable = True
    model.compile(keras.optimizers.SGD(RATE), "mse")
    model.train_on_batch(X, Y)
    model.layers[0].trainable = False
    before = [numpy(v.value) for v in model.variables]
    d = lnp.decompose(model, (X, Y))
    model.train_on_batch(X, Y)
    moved = sum(np.sum((numpy(v.value) - b) ** 2) for v, b in zip(model.variables, before, strict=True))
    assert d.rate == pytest.approx(moved / RATE**2, rel=1e-4)
    assert any("trainable flags" in note for note in d.notes) == (BACKEND == "tensorflow")


def test_a_step_of_the_users_own_is_refused():
    model = net(cls=Logged)
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="has a train_step of its own"):
        lnp.decompose(model, (X, Y))
    named, given = lnp.decompose(model, (X, Y), model.compute_loss), lnp.decompose(model, (X, Y), "mse")
    assert named.rate == pytest.approx(given.rate, rel=1e-5)
    other = net()
    other.compile("sgd", "mse")
    other.train_step = lambda *given: None
    with pytest.raises(ValueError, match="train_step"):
        lnp.decompose(other, (X, Y))


def test_nothing_to_minimise_is_refused():
    model = net()
    model.compile("sgd")
    with pytest.raises(ValueError, match="compiled without a loss, and neither"):
        lnp.decompose(model, (X, Y))


def test_what_a_loss_reads_is_read_anew():
    """Also where traced code would hold it as a constant."""
    scale, penalty = keras.Variable(2.0, trainable=False), keras.Sequential([keras.Input((2,)), layers.Dense(2)])
    loss = lambda y, f: ops.mean((scale * f - y) ** 2, axis=-1) + ops.mean(penalty(f) ** 2, axis=-1)
    model = net()
    model.compile(keras.optimizers.SGD(RATE), loss, run_eagerly=True)
    for value in (1.0, 3.0):
        scale.assign(value)
        penalty.layers[0].bias.assign([value, value])
        expected = float(numpy(ops.mean(loss(ops.convert_to_tensor(Y), model(X)))))
        assert lnp.decompose(model, (X, Y)).loss == pytest.approx(expected, rel=1e-5)
        own = lnp.decompose(model, (X, Y), lambda f, y: ops.mean(loss(y, f)))
        assert own.loss == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_reads_what_is_trained():
    model = net()
    kernel = model.layers[0].kernel
    for given in (True, False):
        loss = lambda y, f: ops.mean((f - y) ** 2, axis=-1) + ops.sum(kernel.value**2)
        model.compile(keras.optimizers.SGD(RATE), loss, run_eagerly=True)
        d = lnp.decompose(model, (X, Y), (lambda f, y: ops.mean(loss(y, f))) if given else None)
        rate, value = stepped(model, (X, Y))
        assert d.total.rate == pytest.approx(rate, rel=1e-4)
        assert d.total.loss == pytest.approx(float(value), rel=1e-5)
