"""Measurements on eight devices of one process, each beside the one-device result; writes what was found as JSON."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lnp
import lnp_jax
from lnp_jax import compile_cache

jax.config.update("jax_enable_x64", True)
SAMPLES, WIDTH = 16, 64
MESH = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "model"))
SPECS = {"w": P(None, "model"), "b": P("model"), "u": P("model", None), "v": P(None, "model")}
draw = np.random.default_rng(0).standard_normal
SIZES = {"w": (6, WIDTH), "b": (WIDTH,), "u": (WIDTH, 24), "v": (24, 4)}
HOST = {name: draw(shape) / np.sqrt(shape[0]) for name, shape in SIZES.items()}
X, LABELS = draw((SAMPLES, 6)), np.arange(SAMPLES) % 4
FACTORS = ("loss", "rate", "chi_loss", "chi_net", "chi_pos")


def apply(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["u"]) @ p["v"]


def placed(h, *axes):
    return jax.lax.with_sharding_constraint(h, NamedSharding(MESH, P(*axes)))


def with_constraints(p, x):
    h = placed(jnp.tanh(x @ p["w"] + p["b"]), "data", "model")
    return placed(jnp.tanh(h @ p["u"]), "data", None) @ p["v"]


def meeting(p, x):
    """Samples meet in a mean, beside what only says where arrays lie."""
    h = placed(jnp.tanh(x @ p["w"] + p["b"]), "data", "model")
    return jnp.tanh(h @ p["u"] + jnp.mean(h @ p["u"], axis=0)) @ p["v"]


def on_one(dtype):
    parameters = {name: jnp.asarray(array, dtype) for name, array in HOST.items()}
    return parameters, (jnp.asarray(X, dtype), jnp.asarray(LABELS))


def on_mesh(dtype, specs=SPECS, mesh=MESH):
    parameters, batch = on_one(dtype)
    parameters = {name: jax.device_put(p, NamedSharding(mesh, specs[name])) for name, p in parameters.items()}
    return parameters, tuple(jax.device_put(part, NamedSharding(mesh, P("data"))) for part in batch)


def factors(d):
    return {**{name: float(getattr(d, name)) for name in FACTORS}, "notes": list(d.notes), "estimator": d.estimator}


@functools.cache
def expected(dtype, function, estimator):
    """What one device finds."""
    parameters, batch = on_one(dtype)
    return factors(lnp.decompose((function, parameters), batch, estimator=estimator, max_probes=2))


def both(dtype, estimator, function=with_constraints, plain=apply, **options):
    """What eight devices find, and what one does."""
    parameters, batch = on_mesh(dtype)
    before = {name: p.sharding for name, p in parameters.items()}
    found = lnp.decompose((function, parameters), batch, estimator=estimator, max_probes=2, **options)
    assert {name: p.sharding for name, p in parameters.items()} == before
    return {"found": factors(found), "expected": expected(dtype, plain, estimator)}


def gathered(program):
    """Shapes of what a compiled program gathers whole from several devices."""
    return sorted(set(re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", program)))


def programs():
    """What the compiled measurement gathers and holds, beside the plain step."""
    parameters, (x, labels) = on_mesh(jnp.float32)

    def loss(p):
        logits = with_constraints(p, x)
        return jnp.mean(jax.nn.logsumexp(logits, 1) - jnp.take_along_axis(logits, labels[:, None], 1)[:, 0])

    step = jax.jit(jax.value_and_grad(loss)).lower(parameters).compile().as_text()
    texts, original = [], compile_cache.program

    def watched(plan):
        def run(*arguments):
            compiled = original(plan).lower(*arguments).compile()
            texts.append(compiled.as_text())
            return compiled(*arguments)

        return run

    compile_cache.program = watched
    try:
        for estimator in ("per_sample", "joint"):
            lnp.decompose((with_constraints, parameters), (x, labels), estimator=estimator)
    finally:
        compile_cache.program = original
    return {"step": gathered(step), "measured": [gathered(text) for text in texts], "all_samples": [
        f"[{SAMPLES},1,{WIDTH}]" in text or f"[{SAMPLES},1,{WIDTH // 2}]" in text for text in texts
    ]}  # fmt: skip


def inside(function, group, **options):
    """The factors by each device of the data axis, measured inside of shard_map."""

    def measured(p, x, y):
        d = lnp_jax.decompose(function, p, (x, y), 0, group=group, max_probes=2, **options)
        return jnp.stack([jnp.asarray(getattr(d, name), float) for name in FACTORS])[None]

    shapes = {"mesh": MESH, "in_specs": (P(), P("data"), P("data")), "out_specs": P("data")}
    parameters, batch = on_one(jnp.float64)
    return jax.jit(jax.shard_map(measured, check_vma=False, **shapes))(parameters, *batch).tolist()


def refused(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("it was measured")


def in_shard_map():
    parameters, (x, labels) = on_one(jnp.float64)
    quarters = [(parameters, (x[n : n + 4], labels[n : n + 4])) for n in range(0, SAMPLES, 4)]
    own = [lnp.decompose((apply, p), batch, estimator="exact") for p, batch in quarters]

    def centred(p, x):
        h = jnp.tanh(x @ p["w"] + p["b"]) @ p["u"]
        return (h - jax.lax.pmean(h, "data")) @ p["v"]

    return {
        "together": {estimator: inside(apply, "data", estimator=estimator) for estimator in ("exact", "per_sample")},
        "expected": {name: list(expected(jnp.float64, apply, name).values()) for name in ("exact", "per_sample")},
        "own": inside(apply, None, estimator="exact"),
        "expected of own": [[getattr(d, name) for name in FACTORS] for d in own],
        "samples that meet": inside(lambda p, x: apply(p, x) - jnp.mean(apply(p, x), axis=0), "data"),
        "network": refused(lambda: inside(centred, "data")),
        "loss": refused(lambda: inside(apply, None, loss=lambda f, y: jax.lax.pmean(jnp.mean(f**2), "data"))),
        "axis": refused(lambda: inside(apply, "rows")),
    }


def with_explicit_axes():
    """Arrays whose types say how they lie, in the context of their mesh."""
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = Mesh(MESH.devices, MESH.axis_names, axis_types=kinds)

    def naming(p, x):
        return jnp.matmul(jnp.tanh(x @ p["w"] + p["b"]) @ p["u"], p["v"], out_sharding=P("data", "model"))

    with jax.set_mesh(mesh):
        parameters, batch = on_mesh(jnp.float64, {**SPECS, "u": P(None, "model"), "w": P(None, None), "b": P()}, mesh)
        before = {name: jax.typeof(p) for name, p in parameters.items()}
        model = apply, {**parameters, "v": jax.device_put(parameters["v"], NamedSharding(mesh, P(None, None)))}
        found = lnp.decompose(model, batch, estimator="exact", seed=jax.random.key(0))
        assert {name: jax.typeof(p) for name, p in parameters.items()} == before
        return {
            "found": factors(found),
            "expected": expected(jnp.float64, apply, "exact"),
            "naming": refused(lambda: lnp.decompose((naming, parameters), batch)),
            "compiled": refused(lambda: jax.jit(lambda p: lnp_jax.decompose(apply, p, batch, 0).rate)(parameters)),
            "kernel": refused(lambda: lnp.kernel(model, batch)),
        }


CASES = {
    "exact, float64": lambda: both(jnp.float64, "exact"),
    "exact, float32": lambda: both(jnp.float32, "exact"),
    "per_sample, float64": lambda: both(jnp.float64, "per_sample"),
    "microbatch, float64": lambda: both(jnp.float64, "exact", microbatch=4),
    "samples that meet": lambda: both(jnp.float64, "auto", meeting, meeting),
    "programs": programs,
    "in shard_map": in_shard_map,
    "explicit axes": with_explicit_axes,
}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({name: case() for name, case in CASES.items()}))
