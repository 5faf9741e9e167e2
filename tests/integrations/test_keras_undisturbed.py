"""Training loops that are watched, beside the same loops unwatched: bit by bit the same in everything that a loop has.

Models and losses with every kind of state on KERAS_BACKEND's framework, alone and as hypothesis puts them together.
Each loop makes two steps: the plain step and one that is shared, watched from outside, or within `fit`.
"""

from __future__ import annotations

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies
from keras import layers, ops

import lnp
import lnp_keras
from integrations.determinism import deterministic
from integrations.keras_stateful import (
    BACKEND,
    IN_FIT,
    LAYERS,
    PARTS,
    data,
    described,
    everything,
    fresh,
    random_states,
)
from lnp_keras.callback import LNPCallback

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in Keras, on PyTorch
STEPS = 2

if BACKEND == "tensorflow":
    fixed_order = pytest.fixture(autouse=True, scope="module")(deterministic)


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


OBSERVED = ("batch norm", "dropout", "dictionary", "object", "numpy", "add_loss")


def before_every_change(values, *kept):
    """All of them on PyTorch; where each is compiled, `kept`, and the others in the session `thorough`."""
    cheap = keras.backend.backend() == "torch"
    return [value if cheap or value in kept else pytest.param(value, marks=pytest.mark.thorough) for value in values]


@pytest.mark.parametrize(
    "case",
    [
        *((name, "value_and_grad") for name in LAYERS),
        *before_every_change(
            [(name, "observe") for name in OBSERVED], ("batch norm", "observe"), ("add_loss", "observe")
        ),
    ],
    ids="-".join,
)
def test_models(case):
    name, way = case
    agree(way, (name,))


@pytest.mark.parametrize("name", ["dictionary", "batch norm", "dropout", "add_loss"])
def test_updates(name):
    agree("step", (name,))


@pytest.mark.parametrize("way", ["value_and_grad", "observe"])
@pytest.mark.parametrize("kind", before_every_change(["moving", "list", "drawing"], "moving"))
def test_losses(kind, way):
    agree(way, ("batch norm",), kind)


@hypothesis.settings(max_examples=2, derandomize=True, database=None)
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


@pytest.mark.parametrize("name", before_every_change(IN_FIT, "batch norm", "add_loss", "regularisers", "metric"))
def test_fit(name):
    if name == "metric" and keras.backend.backend() == "jax":
        pytest.skip("Keras itself cannot update a metric inside of a layer there")
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
