"""A `fit` that is watched ends as one that is not, bit by bit, on each framework."""

from __future__ import annotations

import functools
import random
import warnings

import keras
import numpy as np
import pytest

import lnp
import lnp_keras
from integrations.determinism import deterministic
from lnp_keras.callback import LNPCallback

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in Keras, on PyTorch
GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.standard_normal((48, 6)).astype("float32")
TARGETS = GENERATOR.integers(3, size=48)
PROBE = (INPUTS[:10], TARGETS[:10])
BATCHES = 6

if keras.backend.backend() == "tensorflow":
    fixed_order = pytest.fixture(autouse=True, scope="module")(deterministic)

KINDS = {
    "AdamW": {"optimizer": lambda: keras.optimizers.AdamW(1e-2)},
    "accumulation": {"optimizer": lambda: keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2)},
    # whose optimizer scales losses
    "mixed_float16": {"optimizer": lambda: keras.optimizers.SGD(0.1, momentum=0.9), "policy": "mixed_float16"},
    "three steps per execution": {"optimizer": lambda: keras.optimizers.SGD(0.1), "together": 3},
}

if keras.backend.backend() == "torch":  # where Keras allows one step only
    del KINDS["three steps per execution"]


def network():
    layers = [
        keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.Activation("relu"),
        keras.layers.Dropout(0.4), keras.layers.Dense(3, dtype="float32"),
    ]  # fmt: skip
    return keras.Sequential([keras.Input((6,)), *layers])


def fit(kind, callbacks=(), epochs=2):
    keras.utils.set_random_seed(1)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(KINDS[kind].get("policy", "float32"))
    try:
        model = network()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(KINDS[kind]["optimizer"](), loss, steps_per_execution=KINDS[kind].get("together", 1))
        losses = []
        log = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(logs["loss"]))
        # the watcher comes first, so that it sees the state that the loop leaves
        model.fit(INPUTS, TARGETS, 8, epochs, verbose=0, callbacks=[*callbacks, log])
    finally:
        keras.config.set_dtype_policy(policy)
    states = random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    values = [keras.ops.convert_to_numpy(v) for v in (*model.variables, *model.optimizer.variables)]
    return losses, [value.astype("float64") for value in values], states


def same(a, b):
    return a[0] == b[0] and a[2] == b[2] and all(np.array_equal(x, y) for x, y in zip(a[1], b[1], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_fit_is_not_changed(kind, tmp_path):
    callback = LNPCallback(PROBE, tmp_path / "run.jsonl", schedule=1, max_probes=2)
    assert same(fit(kind, [callback]), fit(kind))
    steps = lnp.History.read(tmp_path / "run.jsonl")["step"].tolist()
    updates = 2 * BATCHES // (2 if kind == "accumulation" else 1)
    assert steps == list(range(0, updates, KINDS[kind].get("together", 1)))


def test_a_difference_would_be_seen():
    class Careless(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.layers[0].kernel.assign(self.model.layers[0].kernel * 1.0001)

    kind = "AdamW"
    assert not same(fit(kind, [Careless()]), fit(kind))
    assert same(fit(kind), fit(kind))


def test_it_measures_what_decompose_does():
    seen = []

    class Beside(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            step = int(self.model.optimizer.iterations)
            if step in (0, 7):
                seen.append(lnp.decompose(self.model, PROBE, seed=step).chi_net)

    callback = LNPCallback(PROBE, schedule=[0, 7])
    fit("AdamW", [callback, Beside()])
    history = callback.tracker.history
    assert history["step"].tolist() == [0, 7]
    assert history["chi_net"].tolist() == pytest.approx(seen, rel=1e-6)
    assert history["parameters"].tolist() == [6 * 8 + 8 + 8 + 8 + 8 * 3 + 3] * 2


@pytest.mark.skipif("three steps per execution" not in KINDS, reason="Keras on PyTorch takes one step at a time")
def test_what_is_due_within_an_execution_is_measured_before_it():
    callback = LNPCallback(PROBE, schedule=[0, 4, 8, 11], max_probes=2)
    fit("three steps per execution", [callback])
    assert callback.tracker.history["step"].tolist() == [0, 3, 6, 9]


def test_batches_of_its_own_and_a_tracker():
    tracker = lnp.Tracker(schedule=3, batch=[PROBE, (INPUTS[:5], TARGETS[:5])], max_probes=2)
    fit("AdamW", [LNPCallback(tracker)])
    assert tracker.history["samples"].tolist() == [10, 5, 10, 5]
    with pytest.raises(TypeError, match="received a tracker, and options"):
        LNPCallback(tracker, schedule=3)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return BATCHES

    def __getitem__(self, index):
        return INPUTS[8 * index : 8 * index + 8], TARGETS[8 * index : 8 * index + 8]


def endless():
    while True:
        yield from (Batches()[index] for index in range(BATCHES))


FEEDS = {
    "class weights": lambda: {"x": INPUTS, "y": TARGETS, "batch_size": 8, "class_weight": {0: 1.0, 1: 2.0, 2: 0.5}},
    "generator": lambda: {"x": endless(), "steps_per_epoch": BATCHES, "shuffle": False},
    "dataset": lambda: {"x": Batches()},
    "validation": lambda: {"x": INPUTS, "y": TARGETS, "batch_size": 8, "validation_data": PROBE},
    "resumed": lambda: {"x": INPUTS, "y": TARGETS, "batch_size": 8, "initial_epoch": 1, "epochs": 3},
}


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="Keras feeds its loops alike on each framework")
@pytest.mark.parametrize("feed", FEEDS)
def test_every_way_to_feed_fit(feed):
    weights = []
    for callbacks in ([], [LNPCallback(PROBE, schedule=[1, 7], max_probes=2)]):
        keras.utils.set_random_seed(1)
        model = network()
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(**{"epochs": 2, "verbose": 0, **FEEDS[feed]()}, callbacks=callbacks)
        weights.append([weight.tobytes() for weight in model.get_weights()])
    assert weights[0] == weights[1]
    assert callbacks[0].tracker.history["step"].tolist() == [1, 7]


# --- what fails ----------------------------------------------------------------------------------------------------


@pytest.fixture
def told():
    """What lnp warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(w.message) for w in caught if str(w.message).startswith("lnp")]


@functools.cache
def unwatched():
    return fit("AdamW")


def out_of_memory(outputs, targets):
    """A loss that does not fit, in the midst of a measurement."""
    keras.ops.sum(outputs)
    raise MemoryError("no room for the outputs")


FAILURES = {
    "loss": (lambda: LNPCallback(PROBE, schedule=1, loss=out_of_memory), "MemoryError: no room"),
    "batch": (lambda: LNPCallback((INPUTS[:10, :3], TARGETS[:10]), schedule=1), "Error"),
    "source": (lambda: LNPCallback(iter([]), schedule=1), "has no more batches"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_measurement_that_fails_does_not_end_fit(failure, told):
    made, reason = FAILURES[failure]
    callback = made()
    assert same(fit("AdamW", [callback]), unwatched())
    assert len(callback.tracker.history) == 0
    first, second = told()
    assert reason in first
    assert f"{2 * BATCHES - 1} times more" in second


def test_it_ends_fit_where_that_is_wanted(told):
    with pytest.raises(MemoryError):
        fit("AdamW", [LNPCallback(PROBE, schedule=1, loss=out_of_memory, on_error="raise")])


def test_a_refused_model_is_told_of_before_the_first_step(monkeypatch, told):
    monkeypatch.setattr(lnp_keras, "refusal", lambda model: "It is sharded.", raising=False)
    monkeypatch.setattr(lnp_keras, "evaluate", lambda *a, **k: pytest.fail("it was measured"))
    callback = LNPCallback(PROBE, schedule=[11])
    assert same(fit("AdamW", [callback]), unwatched())
    assert "ValueError: It is sharded." in told()[0]
    idle = LNPCallback(PROBE, schedule=1, rank=1)
    assert same(fit("AdamW", [idle]), unwatched())
    assert len(told()) == 2
    for rank in (0, 1):
        with pytest.raises(ValueError, match="It is sharded"):
            fit("AdamW", [LNPCallback(PROBE, schedule=[11], rank=rank, on_error="raise")])


def test_steps_without_numbers_are_not_measured(told):
    class Lost(LNPCallback):
        def on_epoch_begin(self, epoch, logs=None):
            model = self._model
            if epoch == 1:
                self._model = object()  # which has no optimizer
            super().on_epoch_begin(epoch, logs)
            self._model = model

    measured = []
    fit("AdamW", [Lost(PROBE, schedule=1, max_probes=2, loggers=lambda values, step: measured.append(step))])
    assert measured == list(range(BATCHES))  # and none of the second epoch under a number of the first
    assert "without measurements in this epoch" in told()[0]
