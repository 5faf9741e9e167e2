"""Training loops that are watched, beside the same loops unwatched: bit by bit the same in everything that a loop has.

Models and losses with every kind of state on KERAS_BACKEND's framework, alone and as hypothesis puts them together.
Each loop makes three steps: the plain step and one that is shared, watched from outside, or within `fit`.
"""

from __future__ import annotations

import collections
import random

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies
from keras import layers, ops

import lnp
import lnp_keras
from integrations.determinism import deterministic
from lnp_keras.callback import LNPCallback

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in Keras, on PyTorch
BACKEND = keras.backend.backend()
STEPS = 3
SYMBOLIC = "a value of a traced step, as Keras leaves it where it makes a model or compiles a step"

if BACKEND == "tensorflow":
    fixed_order = pytest.fixture(autouse=True, scope="module")(deterministic)


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


def plain(model, batch, loss):
    """The step as users write it on each framework."""
    inputs, targets = batch

    def value():
        outputs = model(inputs, training=True)
        if loss is not None:
            return loss(outputs, targets)
        return model.compute_loss(x=inputs, y=targets, y_pred=outputs, training=True)

    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            found = value()
        return found, tape.gradient(found, model.trainable_variables)
    if BACKEND == "torch":
        model.zero_grad()
        found = value()
        found.backward()
        return found.detach(), [variable.value.grad for variable in model.trainable_variables]
    import jax

    others = [*model.non_trainable_variables, *model.metrics_variables]
    others += [loss.centre, loss.generator.state] if loss is not None else []

    def stateless(trained, rest):
        mapping = [*zip(model.trainable_variables, trained, strict=True), *zip(others, rest, strict=True)]
        with keras.StatelessScope(mapping, collect_losses=True) as scope:
            found = value()
        return found, [scope.get_current_value(variable) for variable in others]

    given = [v.value for v in model.trainable_variables], [v.value for v in others]
    (found, rest), gradients = jax.value_and_grad(stateless, has_aux=True)(*given)
    for variable, new in zip(others, rest, strict=True):
        variable.assign(new)
    return found, gradients


def applied(model, gradients):
    pairs = [(g, v) for g, v in zip(gradients, model.trainable_variables, strict=True) if g is not None]
    if BACKEND == "torch":
        import torch

        with torch.no_grad():
            model.optimizer.apply(*zip(*pairs, strict=True))
    else:
        model.optimizer.apply(*zip(*pairs, strict=True))


def loop(way, names, kind):
    model, loss = fresh(names, kind)
    options = {"max_probes": 2, "population": None if kind else False}
    tracker = lnp.Tracker(schedule=1, loss=loss, on_error="raise", **options)
    kept = []
    for step in range(STEPS):
        batch = data(step)
        if way == "value_and_grad":
            (value, d), gradients = lnp_keras.value_and_grad(model, batch, loss, seed=step, **options)
            tracker.record(step, d)
            applied(model, gradients)
        elif way == "step":
            with tracker.step(step, model, batch):
                value, gradients = plain(model, batch, loss)
                applied(model, gradients)
        else:
            if way == "observe":
                tracker.observe(step, model, batch)
            value, gradients = plain(model, batch, loss)
            applied(model, gradients)
        dense = [None if g is None else ops.convert_to_numpy(ops.convert_to_tensor(g)).tobytes() for g in gradients]
        kept += [float(value), *dense]
    _measured(tracker, way)
    return everything(model, loss, kept)


def _measured(tracker, way):
    if way != "plain":
        assert len(tracker.history["chi_net"]) == STEPS
        assert np.all(np.isfinite(tracker.history["chi_net"]))


def agree(way, names, kind="", run=loop):
    for part, a, b in zip(PARTS, run("plain", names, kind), run(way, names, kind), strict=True):
        assert a == b, part


OBSERVED = ("batch norm", "dropout", "spectral norm", "list", "dictionary", "object", "noise", "numpy", "add_loss")


@pytest.mark.parametrize(
    ("name", "way"), [*((name, "value_and_grad") for name in LAYERS), *((name, "observe") for name in OBSERVED)]
)
def test_models(name, way):
    agree(way, (name,))


@pytest.mark.parametrize("name", ["dictionary", "batch norm", "dropout", "add_loss"])
def test_updates(name):
    agree("step", (name,))


@pytest.mark.parametrize("way", ["value_and_grad", "observe"])
@pytest.mark.parametrize("kind", ["moving", "list", "drawing"])
def test_losses(kind, way):
    agree(way, ("batch norm",), kind)


@hypothesis.settings(max_examples=3, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    way=strategies.sampled_from(["value_and_grad", "observe"]),
    names=strategies.lists(strategies.sampled_from(sorted(LAYERS)), min_size=2, max_size=3, unique=True),
    kind=strategies.sampled_from(["", "moving", "list", "drawing"]),
)
def test_drawn(way, names, kind):
    agree(way, tuple(names), kind)


def fitted(way, names, kind):
    """Compiled, or step by step, with the callback or without."""
    model, _ = fresh(names, "")
    model.compile(keras.optimizers.Adam(0.05), "mse", metrics=["mae"], run_eagerly=kind == "eager")
    x, y = (np.concatenate(parts) for parts in zip(*map(data, range(STEPS)), strict=True))
    tracker = lnp.Tracker(schedule=1, batch=data(9), on_error="raise", max_probes=2, population=False)
    losses = []
    log = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(float(logs["loss"])))
    watching = [] if way == "plain" else [LNPCallback(tracker)]
    model.fit(x, y, 6, 1, shuffle=False, verbose=0, callbacks=[*watching, log])
    _measured(tracker, way)
    return everything(model, None, losses)


@pytest.mark.parametrize("name", IN_FIT)
def test_fit(name):
    agree("callback", (name,), "", fitted)


def test_fit_step_by_step():
    agree("callback", ("list",), "eager", fitted)


def test_a_loop_that_is_disturbed_would_be_seen(monkeypatch):
    """By the least: a measurement that leaves one number in a dictionary."""
    observe = lnp.Tracker.observe

    def careless(self, step, model, batch):
        model.layers[1].stats["more"] = 1
        return observe(self, step, model, batch)

    monkeypatch.setattr(lnp.Tracker, "observe", careless)
    with pytest.raises(AssertionError, match="layers"):
        agree("observe", ("plain",))


def test_an_exception():
    """In the middle of a measurement, after everything was written to."""

    def state(fail):
        model, loss = fresh(("list", "dictionary", "object", "array", "numpy", "batch norm", "noise"), "moving")

        def failing(model, inputs):
            model(inputs, training=True)
            raise RuntimeError("from the model")

        if fail:
            with pytest.raises(RuntimeError, match="from the model"):
                lnp_keras.value_and_grad(model, data(0), loss, forward=failing)
        return everything(model, loss, [])

    for part, a, b in zip(PARTS, state(True), state(False), strict=True):
        assert a == b, part


class Lazy(keras.Model):
    """Makes a layer at its first call."""

    def __init__(self):
        super().__init__()
        self.first, self.head = layers.Dense(3), None
        self.first.build((None, 4))
        self.built = True

    def call(self, x):
        if self.head is None:
            self.head = layers.Dense(2)
        return self.head(self.first(x))


def test_a_model_that_is_not_built_is_refused():
    made = []
    for measured in (False, True):
        keras.backend.clear_session()
        keras.utils.set_random_seed(1)
        model = Lazy()
        if measured:
            with pytest.raises(ValueError, match="not built"):
                lnp.decompose(model, data(0), "mse")
            assert model.head is None
        model(data(0)[0])
        made.append(([v.path for v in model.variables], [described(v, {}) for v in model.variables], random_states()))
        assert lnp.decompose(model, data(0), "mse").chi_net > 0
    assert made[0] == made[1]


def test_terms_that_do_not_come_from_the_outputs_are_noted():
    """The step has them, the decomposition does not, also before the first fit."""
    for name in ("add_loss", "regularisers", "plain"):
        model, _ = fresh((name,), "")
        (loss, d), _ = lnp_keras.value_and_grad(model, data(0))
        assert (float(loss) > d.loss * 1.001) == any("add_loss" in note for note in d.notes) == (name != "plain")
