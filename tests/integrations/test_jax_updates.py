"""Updates in JAX, and runs that are watched end bit by bit as others: optax on a pytree, Flax NNX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lnp

KEY = jax.random.key(0)
BATCH = (jax.random.normal(KEY, (16, 5)), jnp.arange(16) % 3)


def loss_of(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def apply(parameters, inputs):
    return jnp.tanh(inputs @ parameters["hidden"]) @ parameters["head"]


def parameters():
    k1, k2 = jax.random.split(jax.random.key(1))
    return {"hidden": jax.random.normal(k1, (5, 7)) / 2, "head": jax.random.normal(k2, (7, 3)) / 2}


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.head = nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(7, rngs=rngs), nnx.Dropout(0.4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def optax_run(tracker=None, steps=6, inside=False):
    optimizer = optax.adamw(1e-2)
    p = parameters()
    state = optimizer.init(p)

    @jax.jit
    def update(p, state):
        value, gradient = jax.value_and_grad(lambda p: loss_of(apply(p, BATCH[0]), BATCH[1]))(p)
        change, state = optimizer.update(gradient, state, p)
        return optax.apply_updates(p, change), state, value

    losses = []
    for step in range(steps):
        if tracker is None:
            p, state, value = update(p, state)
        elif inside:
            with tracker.step(step, (apply, p), BATCH) as watched:
                p, state, value = update(p, state)
                watched.after((apply, p))
        else:
            tracker.observe(step, (apply, p), BATCH)
            p, state, value = update(p, state)
        losses.append(value)
    return jax.tree.leaves((p, state, losses))


def nnx_run(tracker=None, steps=4):
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer):
        value, gradient = nnx.value_and_grad(lambda m: loss_of(m(BATCH[0]), BATCH[1]))(model)
        optimizer.update(model, gradient)
        return value

    losses = []
    for step in range(steps):
        if tracker is not None:
            tracker.observe(step, model, BATCH)
        losses.append(update(model, optimizer))
    # with the counters of the random streams
    return [*jax.tree.leaves((nnx.state(optimizer), losses)), *jax.tree.leaves(nnx.state(model))]


def same(a, b):
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return all(np.array_equal(plain(x), plain(y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("inside", [False, True])
def test_an_optax_loop_is_not_changed(inside):
    tracker = lnp.Tracker(schedule=2)
    assert same(optax_run(tracker, inside=inside), optax_run())
    assert tracker.history["step"].tolist() == [0, 2, 4]


def test_a_flax_loop_is_not_changed():
    tracker = lnp.Tracker(schedule=1, by_layer=True)
    assert same(nnx_run(tracker), nnx_run())
    assert len(tracker.history) == 4
    assert not same(nnx_run(steps=3), nnx_run())


def test_the_step_of_adamw():
    tracker = lnp.Tracker(schedule=1)
    losses = optax_run(tracker, inside=True)[-6:]
    measured = tracker.history["update/measured"][:-1]
    assert measured == pytest.approx(np.diff(losses), rel=1e-3, abs=1e-6)
    assert tracker.history["update/predicted"] == pytest.approx(tracker.history["update/measured"], rel=0.3)


def test_the_step_of_an_nnx_module():
    model = Network(nnx.Rngs(0))
    gradient = nnx.grad(lambda m: loss_of(m(BATCH[0]), BATCH[1]))(nnx.clone(model))
    before = lnp.snapshot(model)
    rate = lnp.decompose(model, BATCH, batch_statistics="coupled").rate
    nnx.update(model, jax.tree.map(lambda p, g: p - 1e-3 * g, nnx.state(model, nnx.Param), gradient))
    step = lnp.step_taken(before, model, BATCH, batch_statistics="coupled")
    assert step.predicted == pytest.approx(-1e-3 * rate, rel=2e-3)
    assert step.measured == pytest.approx(step.predicted, rel=0.02)


def test_a_preconditioned_kernel():
    p = parameters()
    m = jax.tree.map(lambda leaf: 0.5 + jnp.abs(leaf), p)
    d = lnp.decompose((apply, p), BATCH, preconditioner=m, estimator="exact")
    gradient = jax.grad(lambda p: loss_of(apply(p, BATCH[0]), BATCH[1]))(p)
    assert d.rate == pytest.approx(float(sum(jnp.sum(m[n] * gradient[n] ** 2) for n in p)), rel=1e-5)
    jacobian = jax.jacobian(apply)(p, BATCH[0])
    trace = sum(float(jnp.sum(m[n] * jacobian[n] ** 2)) for n in p)
    assert d.chi_net == pytest.approx(trace / 16, rel=1e-5)


def test_an_update_that_nobody_told_of_has_no_loss_change_of_zero():
    tracker = lnp.Tracker(schedule=1)

    def run(p):
        for step in range(2):
            with tracker.step(step, (apply, p), BATCH):
                p = jax.tree.map(lambda leaf: 0.9 * leaf, p)

    with pytest.warns(UserWarning, match=r"is the same after the block.*watched.after\(new_model\)"):
        run(parameters())
    assert len(tracker.history) == 2
    assert "update/measured" not in tracker.history
