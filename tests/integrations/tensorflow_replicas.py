"""Measurements under a MirroredStrategy of two logical devices, beside those without one; writes what was found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

HALVES = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], HALVES)

import keras  # noqa: E402

import lnp  # noqa: E402
from lnp_keras.callback import LNPCallback  # noqa: E402

STRATEGY = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
DRAW = np.random.default_rng(0)
X, LABELS = DRAW.standard_normal((12, 4)), np.arange(12) % 3
W, V = DRAW.standard_normal((4, 5)), DRAW.standard_normal((5, 3))
BATCH = next(iter(STRATEGY.experimental_distribute_dataset(tf.data.Dataset.from_tensor_slices((X, LABELS)).batch(12))))
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
NUMBERS = ("loss", "rate", "chi_loss", "chi_net", "chi_pos", "samples")


class Net(tf.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = tf.Variable(W), tf.Variable(V)

    def __call__(self, x):
        return tf.tanh(x @ self.w) @ self.v


def layers():
    made = keras.Sequential([keras.Input((4,), dtype="float64"), *(keras.layers.Dense(n, a) for n, a in KINDS)])
    made.compile(keras.optimizers.SGD(0.1), LOSS)
    made.set_weights([W, np.zeros(5), V, np.zeros(3)])
    return made


KINDS = ((5, "tanh"), (3, None))


def numbers(d):
    return [float(getattr(d, name)) for name in NUMBERS]


def measured(model, *loss):
    """The whole batch and its halves: without a strategy, outside and inside of its scope, by each replica."""

    def halves():
        found = STRATEGY.run(lambda x, y: lnp.decompose(model, (x, y), *loss, max_probes=2), args=BATCH)
        return [numbers(d) for d in STRATEGY.experimental_local_results(found)]

    found = {"by replicas": halves(), "outside": numbers(lnp.decompose(model, BATCH, *loss, max_probes=2))}
    with STRATEGY.scope():
        found["in scope"] = numbers(lnp.decompose(model, BATCH, *loss, max_probes=2))
        found["arrays in scope"] = numbers(lnp.decompose(model, (X, LABELS), *loss, max_probes=2))
    return found


def expected(model, *loss):
    batches = {"whole": (X, LABELS), "first": (X[:6], LABELS[:6]), "second": (X[6:], LABELS[6:])}
    return {name: numbers(lnp.decompose(model, batch, *loss, max_probes=2)) for name, batch in batches.items()}


def both(make, *loss):
    with STRATEGY.scope():
        mirrored = make()
    return {"found": measured(mirrored, *loss), "expected": expected(make(), *loss)}


def tracked():
    """Rows of a tracker in the scope, and the variables of both replicas after it."""
    with STRATEGY.scope():
        model = Net()
        tracker = lnp.Tracker(schedule=1, on_error="raise")
        with tracker.step(0, model, BATCH):
            model.w.assign_add(tf.ones_like(model.w))
        kept = [bool((value.numpy() == W + 1).all()) for value in STRATEGY.experimental_local_results(model.w)]
    change = lnp.measured_loss_change(Net(), (X, LABELS), update={"w": np.ones_like(W), "v": np.zeros_like(V)})
    return {"kept": kept, "change": float(tracker.history["update/measured"][0]), "expected": change}


def fit(*callbacks):
    with STRATEGY.scope():
        model = layers()
        model.fit(X, LABELS, batch_size=6, epochs=2, verbose=0, shuffle=False, callbacks=list(callbacks))
    return [w.tolist() for w in model.get_weights()]


def fits():
    """In a scope, with the callback and without it."""
    callback = LNPCallback((X, LABELS), schedule=1, on_error="raise", max_probes=2)
    same = fit(callback) == fit()
    first = lnp.decompose(layers(), (X, LABELS), max_probes=2).rate
    return {"same": same, "first": first, "rates": callback.tracker.history["rate"].tolist()}


CASES = {
    "module": lambda: both(Net, LOSS),
    "tracker": tracked,
    "layers": lambda: both(layers),
    "fit": fits,
}

if __name__ == "__main__":
    path, *names = sys.argv[1:]
    Path(path).write_text(json.dumps({name: CASES[name]() for name in names}))
