"""Runs that are measured end bit by bit as others: weights, losses, optimizer, Python state, random states."""

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
from hypothesis import given, settings
from hypothesis import strategies as st

import lnp
import lnp_jax
from integrations.jax_runs import CLASSES, RUNS, SAMPLES, STEPS, Run, callbacks, dense, plain, weights

pytestmark = pytest.mark.filterwarnings("ignore:lnp compiled again")  # as each run is made anew
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

    return lambda number, *arrays: step(*arrays)[:3]


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
APART = {
    ("inside", "experts"), ("inside", "one_output"), ("inside", "counting"), ("outside", "experts"),
    ("outside", "attributes"), ("observe", "loss_with_state"), ("observe", "rule_of_its_own"), ("step", "numpy_mask"),
}  # fmt: skip
"""Runs whose samples are taken apart, which takes long to compile."""
STEPPED = ("plain", "attributes", "python_noise", "numpy_mask", "recurrent", "experts", "flax_net", "equinox_net")
"""Runs around whose step a tracker measures; the others it observes. Both ways measure by the same code."""
CASES = [
    *((way, name) for way in ("inside", "outside") for name in RUNS),
    *(("step" if name in STEPPED else "observe", name) for name in RUNS),
]


@functools.cache
def reference(name: str, way: Callable) -> Any:
    return trained(RUNS[name], way)


@pytest.mark.parametrize(("way", "name"), CASES, ids=["-".join(case) for case in CASES])
def test_a_measured_run_is_not_changed(way, name):
    measured, unmeasured = WAYS[way]
    options = {} if (way, name) in APART else JOINT
    assert trained(RUNS[name], measured, **options) == reference(name, unmeasured)


def test_the_runs_see_a_change():
    """What is compared differs between seeds of Python's and NumPy's random states, and from one step to the next."""
    assert reference("plain", alone) != reference("one_output", alone)
    assert trained(RUNS["plain"], lambda run: lambda number, p, opt, batch: (p, opt, 0.0)) != reference("plain", alone)


@pytest.mark.parametrize("way", ["observe", "step"])
def test_steps_that_donate_their_arrays(way):
    assert trained(plain, WAYS[way][0], donate=True, **JOINT) == trained(plain, alone, donate=True)


@pytest.mark.parametrize("way", ["outside", "observe", "step"])
def test_logs_that_compiled_code_writes(way):
    measured, unmeasured = WAYS[way]
    assert trained(callbacks, measured, **JOINT) == trained(callbacks, unmeasured)


def test_callbacks_that_are_still_on_their_way(monkeypatch):
    """What the user's own step still has to write, its arrays being there already, is no trace of lnp's."""
    log, pending = [], [1.0]

    def barrier():
        log.extend(pending)
        pending.clear()

    monkeypatch.setattr(jax, "effects_barrier", barrier)
    lnp.decompose((lambda p, x: dense(p, x) + len(log), weights()), plain().batch(0), **CHEAP, **JOINT)
    assert log == [1.0]


STATES = ("counter", "list", "numpy", "python", "attribute", "inner jit", "checkpoint", "bfloat16")


@st.composite
def runs(draw: st.DrawFn) -> Callable[[], Run]:
    """A network that keeps some kinds of state at once."""
    kinds = frozenset(draw(st.lists(st.sampled_from(STATES), min_size=2, max_size=5, unique=True)))

    def make() -> Run:
        held: dict[str, Any] = {"calls": 0, "seen": []}

        def network(p, x):
            if "attribute" in kinds:
                network.last = x
            held["calls"] += "counter" in kinds
            held["seen"] += [x] if "list" in kinds else []
            scale = (np.random.rand() if "numpy" in kinds else 1) + (random.random() if "python" in kinds else 0)  # noqa: NPY002
            x = x.astype(jnp.bfloat16) if "bfloat16" in kinds else x
            return scale * dense(p, x)

        network.last = None
        of = jax.checkpoint(network) if "checkpoint" in kinds else network
        of = jax.jit(of) if "inner jit" in kinds else of
        state = lambda: (held["calls"], len(held["seen"]), network.last is None)
        return Run(lambda p, x: of(p, x), weights(), state=state)

    make.__name__ = "-".join(sorted(kinds))
    return make


@settings(max_examples=4, derandomize=True)
@given(runs(), st.sampled_from(sorted(WAYS)))
def test_runs_with_several_kinds_of_state(make, way):
    measured, unmeasured = WAYS[way]
    assert trained(make, measured, **JOINT) == trained(make, unmeasured)


def entry(function: Callable, *arrays: Any) -> list[str]:
    """The fused and single operations of a compiled program outside of its branches, without their names."""
    text = jax.jit(function).lower(*arrays).compile().as_text()
    lines = [line.split(" = ")[1] for line in text[text.index("ENTRY") :].splitlines() if " = " in line]
    anonymous = [re.sub(r"%[\w.-]+|, metadata=.*|, calls=.*", "", line) for line in lines]
    return sorted(line for line in anonymous if " fusion(" in line or " dot(" in line)


@pytest.mark.parametrize("shared", [True, False], ids=["value_and_grad", "decompose"])
def test_the_compiled_step_is_the_one_without_a_measurement(shared):
    """XLA joins equal operations: nothing that is measured may be equal to what the step computes, also what is made
    of arrays that functions have closed over.
    """
    p, (x, y), loss = weights(), plain().batch(0), plain().loss
    closing_over = lambda y: lambda p, x: dense(p, jnp.sin(x) * jnp.tanh(y).sum())
    updated = lambda p, gradients: jax.tree.map(lambda p, g: p - 0.1 * (g + 0.01 * p), p, gradients)

    def unmeasured(p, x, y):
        value, gradients = jax.value_and_grad(lambda p: loss(closing_over(y)(p, x), y))(p)
        return value, updated(p, gradients)

    def measured(p, x, y, key):
        if not shared:
            return *unmeasured(p, x, y), lnp_jax.decompose(closing_over(y), p, (x, y), key, loss=loss, **CHEAP).rate
        (value, d), gradients = lnp_jax.value_and_grad(closing_over(y), loss, **CHEAP)(p, (x, y), key)
        return value, updated(p, gradients), d.rate

    expected, found = entry(unmeasured, p, x, y), entry(measured, p, x, y, KEY)
    assert expected
    for operation in expected:
        twice = " dot(" in operation or "kind=kCustom" in operation  # products, which the measurement makes for itself
        assert found.count(operation) >= expected.count(operation) * (1 + twice), operation


def test_all_passes_of_a_measurement_are_one_function():
    """Measured and predicted loss changes agree where numbers are drawn, and counted, at every call."""
    for make in (RUNS["numpy_mask"], RUNS["python_noise"], RUNS["attributes"], RUNS["loss_with_state"]):
        run = make()
        model, batch = (run.apply, run.parameters), run.batch(0)
        measured = lnp.measured_loss_change(model, batch, run.loss, learning_rate=1e-3)
        assert measured == pytest.approx(
            lnp.predicted_loss_change(model, batch, run.loss, learning_rate=1e-3), rel=0.02
        )


def test_what_is_refused_is_refused_before_the_step():
    calls = []
    measured = lnp_jax.value_and_grad(lambda p, x: calls.append(1) or dense(p, x))
    with pytest.raises(ValueError, match="labels"):
        measured(weights(), (plain().batch(0)[0], jnp.full(SAMPLES, CLASSES)), KEY)
    assert not calls
