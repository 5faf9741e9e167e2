"""Runs that are measured end bit by bit as those that are not: weights, losses, optimizer, Python state, random states."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lnp
import lnp_jax
from integrations import jax_runs
from integrations.jax_runs import CLASSES, RUNS, SAMPLES, STEPS, WIDTH, Run, normal, weights

OPTIMIZER = optax.adamw(1e-2)
CHEAP = {"population": False, "max_probes": 1, "loss_terms": SAMPLES * CLASSES}
KEY = jax.random.key(7)


def bits(tree: Any) -> Any:
    """Everything as bytes, with types and shapes."""
    if isinstance(tree, jax.Array) and jnp.issubdtype(tree.dtype, jax.dtypes.prng_key):
        tree = jax.random.key_data(tree)
    if isinstance(tree, dict):
        return {name: bits(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [bits(value) for value in tree]
    return (str(np.asarray(tree).dtype), np.shape(tree), np.asarray(tree).tobytes()) if hasattr(tree, "dtype") else tree


def trained(make: Callable[[], Run], way: Callable, **options: Any) -> Any:
    """What a run of a few steps leaves."""
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    run = make()
    jax.clear_caches() if options.pop("anew", False) else None
    p, step = run.parameters, way(run, **options)
    opt, losses = OPTIMIZER.init(p), []
    for number in range(STEPS):
        p, opt, loss = step(number, p, opt, run.batch(number))
        losses.append(loss)
    jax.effects_barrier()
    randomness = random.getstate(), np.random.get_state()  # noqa: NPY002
    return bits([jax.tree.leaves((p, opt, losses)), run.state(), randomness])


def moved(gradients: Any, opt: Any, p: Any) -> tuple[Any, Any]:
    change, opt = OPTIMIZER.update(gradients, opt, p)
    return optax.apply_updates(p, change), opt


def alone(run: Run, donate: bool = False) -> Callable:
    """One compiled step, without lnp."""

    @functools.partial(jax.jit, donate_argnums=(0, 1) if donate else ())
    def step(p, opt, batch):
        loss, gradients = jax.value_and_grad(lambda p: run.loss(run.apply(p, batch[0]), batch[1]))(p)
        return *moved(gradients, opt, p), loss

    return lambda number, p, opt, batch: step(p, opt, batch)


def inside(run: Run, **options: Any) -> Callable:
    """The same with the measurement in the compiled step."""
    measured = lnp_jax.value_and_grad(run.apply, run.loss, **CHEAP, **options)

    @jax.jit
    def step(p, opt, batch):
        (loss, d), gradients = measured(p, batch, KEY)
        return *moved(gradients, opt, p), loss, d.rate

    return lambda number, *given: step(*given)[:3]


def alone_in_two(run: Run) -> Callable:
    """Loss and gradient in one compiled function, the update in another."""
    gradient = jax.jit(lambda p, x, y: jax.value_and_grad(lambda p: run.loss(run.apply(p, x), y))(p))
    update = jax.jit(moved)

    def step(number, p, opt, batch):
        loss, gradients = gradient(p, *batch)
        return *update(gradients, opt, p), loss

    return step


def outside(run: Run, **options: Any) -> Callable:
    measured, update = lnp_jax.value_and_grad(run.apply, run.loss, **CHEAP, **options), jax.jit(moved)

    def step(number, p, opt, batch):
        (loss, d), gradients = measured(p, batch, KEY)
        assert d.rate > 0
        return *update(gradients, opt, p), loss

    return step


def observed(run: Run, donate: bool = False, **options: Any) -> Callable:
    tracker, step = lnp.Tracker(schedule=1, on_error="raise", loss=run.loss, **CHEAP, **options), alone(run, donate)

    def watched(number, p, opt, batch):
        tracker.observe(number, run.measured(p), batch)
        return step(number, p, opt, batch)

    return watched


def stepped(run: Run, donate: bool = False, **options: Any) -> Callable:
    tracker, step = lnp.Tracker(schedule=1, on_error="raise", loss=run.loss, **CHEAP, **options), alone(run, donate)

    def watched(number, p, opt, batch):
        with tracker.step(number, run.measured(p), batch) as seen:
            p, opt, loss = step(number, p, opt, batch)
            seen.after(run.measured(p))
        assert np.isfinite(tracker.history["update/measured"][-1])
        return p, opt, loss

    return watched


WAYS = {
    "inside": (inside, alone),
    "outside": (outside, alone_in_two),
    "observe": (observed, alone),
    "step": (stepped, alone),
}
JOINT = {"estimator": "joint"}
CASES = [
    *(("inside", name, {}) for name in RUNS),
    *(("outside", name, {} if name in ("experts", "numpy_mask") else JOINT) for name in RUNS),
    *(("observe", name, JOINT if name in ("plain", "remade", "equinox_net") else {}) for name in RUNS),
    *(("step", name, JOINT) for name in RUNS),
]


@pytest.mark.parametrize(("way", "name", "options"), CASES, ids=[f"{way}-{name}" for way, name, _ in CASES])
def test_a_measured_run_is_not_changed(way, name, options):
    measured, reference = WAYS[way]
    assert trained(RUNS[name], measured, **options) == trained(RUNS[name], reference)
