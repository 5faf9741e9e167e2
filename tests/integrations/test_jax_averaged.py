"""Net rates of a loop with optax, and measuring at its averaged parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lnp

R = np.random.default_rng(0)
X, Y = R.standard_normal((12, 4)).astype("float32"), R.integers(0, 3, 12)


def apply(parameters, x):
    return x @ parameters["w"]


def run(tracker=None, averaged=None):
    """SGD with a learning rate that is halved at each step, on half of the samples; and an average of its weights."""
    schedule = optax.exponential_decay(0.2, 1, 0.5)
    optimizer, mean = optax.sgd(schedule), optax.ema(0.5)
    parameters = {"w": jnp.zeros((4, 3))}
    state, average_state, average = optimizer.init(parameters), mean.init(parameters), parameters
    gradient = jax.grad(lambda p: optax.softmax_cross_entropy_with_integer_labels(apply(p, X[:6]), Y[:6]).mean())
    tracker = None if tracker is None else tracker(schedule)
    for step in range(5):
        if tracker is not None:
            tracker.observe(step, (apply, average if averaged else parameters))
        updates, state = optimizer.update(gradient(parameters), state)
        parameters = optax.apply_updates(parameters, updates)
        average, average_state = mean.update(parameters, average_state)
    return np.asarray(parameters["w"]), np.asarray(average["w"]), tracker


def loss_of(w):
    logits = X @ w
    return -np.mean(np.take_along_axis(logits - np.log(np.exp(logits).sum(1, keepdims=True)), Y[:, None], 1))


@pytest.mark.parametrize("averaged", [False, True])
def test_a_loop_with_optax(averaged):
    w, mean, tracker = run(lambda s: lnp.Tracker(schedule=2, batch=(X, Y), learning_rate=s, on_error="raise"), averaged)
    assert all(map(np.array_equal, (w, mean), run()[:2]))
    first, second, third = tracker.history.rows()
    assert [row["net/learning_rate_sum"] for row in (second, third)] == pytest.approx([0.3, 0.075])
    assert second["net/loss_fall"] == pytest.approx(first["loss"] - second["loss"], abs=1e-6)
    assert second["net/rate_stderr"] > 0
    assert "net/chi_pos" in third
    if averaged:
        d = lnp.decompose((apply, {"w": jnp.asarray(mean)}), (X, Y))
        assert d.loss == pytest.approx(loss_of(mean), rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "sums"),
    [(None, True), (lambda f, y: jnp.mean(jnp.sum(f**2, 1)), True), (lambda f, y: jnp.var(f), False)],
    ids=["inferred", "own", "none"],
)
def test_each_sample_s_part_of_the_loss(loss, sums):
    w = jnp.asarray(R.standard_normal((4, 3)), jnp.float32)
    d = lnp.decompose((apply, {"w": w}), (X, Y), loss, sample_losses=True)
    single = [lnp.decompose((apply, {"w": w}), (X[[n]], Y[[n]]), loss).loss for n in range(12)]
    found = np.asarray(d.sample_losses.parts)
    assert np.allclose(found, np.array(single) / 12, rtol=1e-5) if sums else np.isnan(found).all()
