"""Models and losses with every kind of state on KERAS_BACKEND's framework, and all that a loop with them has."""

from __future__ import annotations

import collections
import random

import keras
import numpy as np
from keras import layers, ops

BACKEND = keras.backend.backend()
SYMBOLIC = "a value of a traced step, as Keras leaves it where it makes a model or compiles a step"


class Helper:
    """An object of the user's own, without variables."""

    def __init__(self):
        self.calls, self.last = 0, None


@keras.saving.register_keras_serializable()
class Stateful(layers.Layer):
    """Writes to what it holds, in the way that its kind says."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.calls, self.seen, self.stats, self.helper = kind, 0, [], {"count": 0}, Helper()
        self.queue, self.array = collections.deque(maxlen=2), np.zeros(5, "float32")
        self.generator, self.numpy_generator = keras.random.SeedGenerator(5), np.random.default_rng(2)
        self.mean = keras.metrics.Mean()

    def build(self, shape):
        self.moving = self.add_weight(shape=(5,), trainable=False, initializer="zeros", name="moving")
        self.scale = self.add_weight(shape=(5,), initializer="ones", name="scale")

    def call(self, x):
        return getattr(self, f"_{self.kind}")(x) * self.scale

    def _plain(self, x):
        return x

    def _counter(self, x):
        self.calls += 1
        return x * (1.0 + 0.01 * self.calls)

    def _list(self, x):
        self.seen.append(x)
        return x * (1.0 + 0.01 * len(self.seen))

    def _dictionary(self, x):
        self.stats["count"] += 1
        self.stats["last"] = x
        return x * (1.0 + 0.01 * self.stats["count"])

    def _object(self, x):
        self.helper.calls += 1
        self.helper.last = x
        self.queue.append(x)
        return x * (1.0 + 0.01 * self.helper.calls)

    def _array(self, x):
        self.array += 1.0
        return x + ops.convert_to_tensor(self.array)

    def _moving(self, x):
        self.moving.assign(0.9 * self.moving + 0.1 * ops.mean(x, axis=0))
        return x - 0.5 * self.moving

    def _noise(self, x):
        return x + 0.1 * keras.random.normal(ops.shape(x), seed=self.generator)

    def _metric(self, x):
        self.mean.update_state(x)
        return x

    def _add_loss(self, x):
        self.add_loss(0.3 * ops.mean(x**2))
        return x

    def _numpy(self, x):
        return x * float(1.0 + 0.1 * np.random.standard_normal() + 0.1 * self.numpy_generator.standard_normal())  # noqa: NPY002

    def _python(self, x):
        return x * random.choice([0.5, 1.0, 2.0])


KINDS = [name[1:] for name in vars(Stateful) if name[0] == "_" and name[1] != "_" and callable(getattr(Stateful, name))]
LAYERS = {
    "batch norm": layers.BatchNormalization,
    "dropout": lambda: layers.Dropout(0.4),
    "regularisers": lambda: layers.Dense(5, kernel_regularizer="l2", activity_regularizer="l2"),
    "spectral norm": lambda: layers.SpectralNormalization(layers.Dense(5)),
    "recurrent dropout": lambda: keras.Sequential([layers.Reshape((5, 1)), layers.SimpleRNN(5, recurrent_dropout=0.3)]),
} | {kind: lambda kind=kind: Stateful(kind) for kind in KINDS}
IN_FIT = ("plain", "batch norm", "dropout", "regularisers", "moving", "noise", "metric", "add_loss", "counter", "list")


class Centred:
    """A loss (outputs, targets) with a moving centre, a list, and numbers that it draws."""

    def __init__(self, kind):
        self.kind, self.seen = kind, []
        self.centre, self.generator = keras.Variable(np.zeros(2, "float32")), keras.random.SeedGenerator(7)

    def __call__(self, outputs, targets):
        targets = ops.convert_to_tensor(targets)
        value = (outputs - targets) ** 2
        if self.kind == "moving":
            self.centre.assign(0.9 * self.centre + 0.1 * ops.mean(outputs, axis=0))
            value = (outputs - targets - self.centre) ** 2
        elif self.kind == "list":
            self.seen.append(len(self.seen))
            value = value * (1.0 + 0.1 * len(self.seen))
        elif self.kind == "drawing":
            value = value * keras.random.uniform(ops.shape(value), seed=self.generator)
        return ops.mean(value)


def described(value, seen):
    """Everything below a value, as plain data; what comes again is named by its number."""
    if isinstance(value, keras.Variable):
        return value.path.rpartition("/")[2], keras.ops.convert_to_numpy(value.value).tobytes()
    if ops.is_tensor(value) or isinstance(value, np.ndarray):
        kind = type(value).__name__
        symbolic = "Tracer" in kind or "Symbolic" in kind or getattr(value, "is_meta", False)
        return SYMBOLIC if symbolic else ops.convert_to_numpy(value).tobytes()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = len(seen)
    if isinstance(value, collections.abc.Mapping):
        return {str(key): described(child, seen) for key, child in value.items()}
    if isinstance(value, list | tuple | collections.deque):
        return [described(child, seen) for child in value]
    if isinstance(value, keras.Layer | Helper | Centred | keras.random.SeedGenerator | keras.metrics.Metric):
        names = [name for name in vars(value) if not name.startswith(("_self_", "_obj_reference")) and name != "name"]
        return type(value).__name__, [(name, described(vars(value)[name], seen)) for name in names if name != "_name"]
    return type(value).__name__


def random_states():
    states = [random.getstate(), repr(np.random.get_state())]  # noqa: NPY002
    if BACKEND == "tensorflow":
        from tensorflow.python.eager import context

        states.append(context.context()._rng.getstate())
    if BACKEND == "torch":
        import torch

        states.append(torch.get_rng_state().numpy().tobytes())
    return states


def everything(model, loss, kept):
    values = [described(variable, {}) for variable in (*model.variables, *model.optimizer.variables)]
    metrics = [described(variable, {}) for variable in model.metrics_variables]
    return values, metrics, described([*model._flatten_layers()], {}), described(loss, {}), kept, random_states()


PARTS = ("variables", "metrics", "layers", "loss", "steps", "random states")


def fresh(names, kind):
    keras.backend.clear_session()
    keras.utils.set_random_seed(1)
    middle = [LAYERS[name]() for name in names]
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5, "tanh"), *middle, layers.Dense(2)])
    model.compile(keras.optimizers.Adam(0.05), "mse", run_eagerly=True)
    model.optimizer.build(model.trainable_variables)
    return model, Centred(kind) if kind else None


def data(step):
    return tuple(np.random.default_rng(step).standard_normal((6, k)).astype("float32") for k in (4, 2))
