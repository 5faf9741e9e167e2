"""Losses of the user's own: population values where they are a mean over samples, and only there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

import lnp
from lnp_jax.losses import found_mean

SAMPLES, CLASSES = 24, 4


def cross_entropy(o, t):
    return optax.softmax_cross_entropy_with_integer_labels(o, t)


def contrastive(o, t):
    normal = o / jnp.linalg.norm(o, axis=1, keepdims=True)
    return cross_entropy(normal @ jnp.roll(normal, 1, 0).T / 0.5, jnp.arange(len(o))).mean()


MEANS = {
    "optax": lambda o, t: cross_entropy(o, t).mean(),
    "of probabilities": lambda o, t: -jnp.log(jnp.take_along_axis(o, t[:, None], 1)).mean(),
}
OTHERS = {
    "sum": lambda o, t: cross_entropy(o, t).sum(),
    "logarithm": lambda o, t: jnp.log(cross_entropy(o, t).mean()),
    "batch statistics": lambda o, t: cross_entropy((o - o.mean(0)) / o.std(0), t).mean(),
    "ranking": lambda o, t: jax.nn.softplus(o[:, None, 0] - o[None, :, 0]).mean(),
    "gated": lambda o, t: cross_entropy(o, t).mean() + (jax.nn.relu(o - 1).sum(0) ** 2).mean(),
    "whole batches": lambda o, t: cross_entropy(o.reshape(SAMPLES, CLASSES), t).mean(),
    "contrastive": contrastive,
}


def apply(parameters, x):
    return jax.nn.sigmoid(x @ parameters["hidden"]) @ parameters["head"]


def made():
    keys = jax.random.split(jax.random.key(0), 3)
    parameters = {"hidden": jax.random.normal(keys[0], (5, 8)), "head": jax.random.uniform(keys[1], (8, CLASSES))}
    return (apply, parameters), (jax.random.normal(keys[2], (SAMPLES, 5)), jnp.arange(SAMPLES) * 5 % 7 % CLASSES)


@pytest.mark.parametrize("name", [*MEANS, *OTHERS])
def test_by_the_loss_gradient_of_some_samples(name):
    (function, parameters), (x, y) = made()
    assert found_mean({**MEANS, **OTHERS}[name], function(parameters, x), y) is (name in MEANS)


def test_several_outputs_and_targets():
    outputs, targets = {"a": jnp.ones((9, 2)), "b": jnp.ones((9, 3))}, (jnp.ones((9, 2)), jnp.ones((9,), bool))
    mean = lambda o, t: ((o["a"] - t[0]) ** 2).mean() + jnp.where(t[1][:, None], o["b"] ** 2, 0).mean()
    assert found_mean(mean, outputs, targets)
    assert not found_mean(lambda o, t: mean(o, t) + o["b"].mean() ** 2, outputs, targets)
    assert not found_mean(mean, outputs, (targets[0], jnp.ones((4,), bool)))


def test_population_values():
    model, batch = made()
    assert lnp.decompose(model, batch, MEANS["optax"], rtol=0.1).population is not None
    d = lnp.decompose(model, batch, contrastive, rtol=0.1)
    assert d.population is None
    assert any("whether the loss is a mean over samples" in note for note in d.notes)


def padded(o, t):
    return jnp.sum(cross_entropy(o, jnp.where(t < 0, 0, t)) * (t >= 0)) / jnp.sum(t >= 0)


def test_the_values_of_a_batch_do_not_decide():
    """A mean over labels that are not padding, whichever batch is the first."""
    (function, parameters), (x, y) = made()
    outputs, many = function(parameters, x), jnp.where(jnp.arange(SAMPLES) % 3 > 0, -100, y)
    assert found_mean(padded, outputs, many) is found_mean(padded, outputs, y) is True


def test_inside_the_users_own_compiled_function():
    model, (x, y) = made()

    @jax.jit
    def rates(parameters, x, y, weight):
        plain = lnp.decompose((apply, parameters), (x, y), MEANS["optax"], rtol=0.1).population
        held = lnp.decompose((apply, parameters), (x, y), lambda o, t: weight * MEANS["optax"](o, t), rtol=0.1)
        return plain.rate, held.population is None  # a loss that holds what is traced cannot be tried

    rate, unknown = rates(model[1], x, y, 1.0)
    assert unknown
    assert rate == pytest.approx(lnp.decompose(model, (x, y), MEANS["optax"], rtol=0.1).population.rate, rel=1e-4)
