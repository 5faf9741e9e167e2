"""Batch statistics that are held fixed leave the network what it is, or they are not held."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lnp
from integrations.jax_reference import agrees, dense
from lnp.per_sample.verdict import FROZEN_DIFFERS
from lnp_jax.replay import NOTE


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


class Normed(nnx.Module):
    """A layer, batch normalisation in training mode, and what a subclass makes of them."""

    def __init__(self, norm=nnx.BatchNorm):
        rngs = nnx.Rngs(0)
        self.layer = nnx.Linear(3, 4, rngs=rngs, param_dtype=jnp.float64)
        self.norm = norm(4, rngs=rngs, param_dtype=jnp.float64)
        self.norm.mean, self.norm.var = nnx.BatchStat(jnp.zeros(4)), nnx.BatchStat(jnp.ones(4))

    def __call__(self, x):
        return jnp.tanh(self.norm(self.layer(x)))


class Twice(Normed):
    def __call__(self, x):
        return jnp.tanh(self.norm(self.layer(x))) - jnp.tanh(self.norm(self.layer(2 * x + 1)))


class AskedByTheCall(Normed):
    """What the call says counts more than what the layer holds."""

    def __call__(self, x):
        return jnp.tanh(self.norm(self.layer(x), use_running_average=False))


class Renormed(nnx.BatchNorm):
    """An invented layer, which normalises by its running statistics in another way."""

    def __call__(self, x):
        y = super().__call__(x)
        return y if self.use_running_average else y * jnp.max(jnp.abs(x))


class Standardised(Normed):
    """Statistics of a weight, which are part of the function of the parameters."""

    def __call__(self, x):
        return jnp.tanh(x @ self.norm(self.layer.kernel[...]) + self.layer.bias[...])


class Invented(Normed):
    """A layer with variables of its own."""

    def __init__(self):
        super().__init__()
        self.seen = nnx.BatchStat(jnp.zeros(4))

    def __call__(self, x):
        h = self.layer(x)
        self.seen[...] = h.mean(0)
        return jnp.tanh(h - self.seen[...])


class Evaluated(Normed):
    def __call__(self, x):
        return jnp.tanh(self.norm(self.layer(x), use_running_average=True))


MODELS = {
    "as usual": (Normed, True, (NOTE,)),
    "twice": (Twice, False, (FROZEN_DIFFERS, "interact")),
    "asked by the call": (AskedByTheCall, False, ("interact",)),
    "another layer made of it": (lambda: Normed(Renormed), False, (FROZEN_DIFFERS, "interact")),
    "of a weight": (Standardised, False, ()),
    "invented": (Invented, False, ("interact",)),
    "evaluated": (Evaluated, False, ()),
}
"""{name: (model, whether its statistics are held, what its notes say)}."""


def function_of(model, x, held):
    """The function of the parameters that is to be measured."""
    if held:
        seen = model.layer(x)
        model = nnx.clone(model)
        model.norm.mean, model.norm.var = nnx.BatchStat(seen.mean(0)), nnx.BatchStat(seen.var(0))
        model.norm.use_running_average = True
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    return lambda p: nnx.merge(graph, p, rest, copy=True)(x), parameters


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_held_or_it_is_said(name):
    make, held, said = MODELS[name]
    model, x, y = make(), normal(6, 3), normal(6, 4, seed=1)
    d = lnp.decompose(model, (x, y), estimator="exact", population=False)
    function, parameters = function_of(model, x, held)
    agrees(d, dense(function, parameters, lambda outputs: jnp.mean((outputs - y) ** 2), y.size))
    assert [any(text in note for note in d.notes) for text in said] == [True] * len(said), d.notes
    assert any(NOTE in note for note in d.notes) == held
    if name == "twice":  # known from now on, and in what takes other ways
        loss = lambda p: jnp.mean((function(p) - y) ** 2)
        gradient = jax.grad(loss)(parameters)
        moved = loss(jax.tree.map(lambda p, g: p - 0.01 * g, parameters, gradient))
        change = lnp.measured_loss_change(model, (x, y), learning_rate=0.01)
        assert change == pytest.approx(float(moved - loss(parameters)), rel=1e-8)
        kernel = lnp.kernel(Twice(), (x[:4], y[:4]))
        assert any(FROZEN_DIFFERS in note for note in kernel.notes)


def test_statistics_that_are_no_longer_the_networks_own():
    """Two calls of one layer see the same numbers until a shift between them is learnt."""

    class Shifted(Normed):
        def __init__(self):
            super().__init__()
            self.shift = nnx.Param(jnp.zeros(()))

        def __call__(self, x):
            return self.norm(self.layer(x)) * self.norm(self.layer(x * (1 + self.shift[...])))

    model, x, y = Shifted(), normal(6, 3), normal(6, 4, seed=1)
    assert any(NOTE in note for note in lnp.decompose(model, (x, y)).notes)
    model.shift[...] = jnp.asarray(0.5)
    d = lnp.decompose(model, (x, y))
    assert any(FROZEN_DIFFERS in note for note in d.notes)
    assert d.loss == pytest.approx(float(jnp.mean((nnx.clone(model)(x) - y) ** 2)), rel=1e-12)
    inside = jax.jit(lambda state: lnp.decompose(nnx.merge(nnx.graphdef(model), state), (x, y)).loss)
    assert np.isfinite(inside(nnx.state(model)))
