"""One of two processes that `jax.distributed` joins, of two devices each; writes what it found as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lnp
from lnp_jax import processes

RANK, PORT, FOLDER = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{PORT}", 2, RANK)
MESH = Mesh(np.asarray(jax.devices()).reshape(2, 2), ("data", "model"))
DRAW = np.random.default_rng(0).standard_normal
HOST = {"w": DRAW((6, 16)), "b": DRAW(16), "v": DRAW((16, 3))}
SPECS = {"w": P(None, "model"), "b": P("model"), "v": P("model", None)}
X, LABELS = DRAW((8, 6)), np.arange(8) % 3
FACTORS = ("loss", "rate", "chi_loss", "chi_net", "chi_pos")


def apply(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def spread(array, spec):
    return jax.make_array_from_callback(array.shape, NamedSharding(MESH, spec), lambda index: array[index])


def factors(d):
    return [getattr(d, name) for name in FACTORS]


def refused(call):
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    raise AssertionError("it was measured")


model = apply, {name: spread(array, SPECS[name]) for name, array in HOST.items()}
batch = spread(X, P("data")), spread(LABELS, P("data"))
alone = (apply, jax.tree.map(jnp.asarray, HOST)), (jnp.asarray(X), jnp.asarray(LABELS))
options = {"estimator": "per_sample", "max_probes": 2, "sample_losses": True}


def tracked():
    """A tracker of its own in each process, and the same file."""
    tracker = lnp.Tracker(FOLDER / "run.jsonl", schedule=1, on_error="raise", **options)
    with tracker.step(0, model, batch) as watched:
        watched.after((apply, jax.tree.map(lambda p: 0.999 * p, model[1])))
    tracker.close()
    return watched.decomposition.rate


def missed():
    """What one process asks for without the other, and what both ask for afterwards."""
    found, over = {}, FOLDER / "over"
    if RANK == 0:
        processes.PATIENCE = 1
        found["alone"] = refused(lambda: lnp.decompose(model, batch, **options))
        processes.PATIENCE = 60
        over.touch()
    while not over.exists():
        time.sleep(0.05)
    return found | {"again": factors(lnp.decompose(model, batch, **options))}


d, one = (lnp.decompose(*case, **options) for case in ((model, batch), alone))
found = {
    "found": factors(d),
    "expected": factors(one),
    "losses": [list(map(float, each.sample_losses.parts)) for each in (d, one)],
    "kernel": refused(lambda: lnp.kernel(model, batch)),
    "labels": refused(lambda: lnp.decompose(model, (batch[0], spread(LABELS + 7, P("data"))), **options)),
    "tracked": tracked(),
    "missed": missed(),
}
(FOLDER / f"{RANK}.json").write_text(json.dumps(found))
