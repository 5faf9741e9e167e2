"""Keras's distribution on eight devices of JAX, beside one device; writes what was found as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import keras
import numpy as np

import lnp
from lnp.contract.options import Options
from lnp_keras.callback import LNPCallback
from lnp_keras.handover import handed_over

DRAW = np.random.default_rng(0).standard_normal
X, LABELS = DRAW((16, 4)).astype("float32"), np.arange(16) % 3
WEIGHTS = [DRAW((4, 16)), np.zeros(16), DRAW((16, 3)) / 4, np.zeros(3)]
FACTORS = ("loss", "rate", "chi_loss", "chi_net", "chi_pos")


def layers():
    made = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, "tanh", name="hidden"), keras.layers.Dense(3)])
    made.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    made.set_weights(WEIGHTS)
    return made


def fit(*callbacks):
    model = layers()
    model.fit(X, LABELS, batch_size=8, epochs=1, verbose=0, shuffle=False, callbacks=list(callbacks))
    return [np.asarray(w).tolist() for w in model.get_weights()]


def found():
    model = layers()
    d = lnp.decompose(model, (X, LABELS), estimator="exact")
    batch, _ = handed_over(model, ((X, LABELS),), Options()).batches[0]
    callback = LNPCallback((X, LABELS), schedule=1, on_error="raise", estimator="exact")
    same = fit(callback) == fit()
    return {
        "factors": [getattr(d, name) for name in FACTORS],
        "notes": list(d.notes),
        "samples_of_a_device": batch["inputs"].addressable_shards[0].data.shape[0],
        "numbers_of_a_device": model.layers[0].kernel.value.addressable_shards[0].data.size,
        "same": same,
        "rates": callback.tracker.history["rate"].tolist(),
    }


def split():
    """Batches along one axis of a mesh, the hidden layer along the other."""
    mesh = keras.distribution.DeviceMesh((4, 2), ("batch", "model"), keras.distribution.list_devices("cpu"))
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*hidden/kernel"] = (None, "model")
    return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")


if __name__ == "__main__":
    cases = {"one device": found()}
    for name, make in {"data": keras.distribution.DataParallel, "model": split}.items():
        keras.distribution.set_distribution(make())
        cases[name] = found()
    Path(sys.argv[1]).write_text(json.dumps(cases))
