"""Batch statistics of any library are held fixed where a network averages them; nothing else is."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lnp
from integrations.jax_reference import agrees, dense
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
    "as usual": (Normed, True, ()),
    "twice": (Twice, True, ()),
    "asked by the call": (AskedByTheCall, True, ()),
    "another layer made of it": (lambda: Normed(Renormed), True, ("interact",)),
    "of a weight": (Standardised, False, ()),
    "invented": (Invented, False, ("interact",)),
    "evaluated": (Evaluated, False, ()),
}
"""{name: (model, whether its statistics are held, what else its notes say)}."""


def normalised(model, h, held):
    """What a normalisation makes of h, with the statistics of `held`."""
    y = (h - held.mean(0)) / jnp.sqrt(held.var(0) + model.norm.epsilon) * model.norm.scale[...] + model.norm.bias[...]
    return y * jnp.max(jnp.abs(h)) if isinstance(model.norm, Renormed) else y


def function_of(model, x, held):
    """The function of the parameters that is to be measured."""
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    whole = lambda p: nnx.merge(graph, p, rest, copy=True)

    def with_statistics(p):
        tanh = lambda x: jnp.tanh(normalised(whole(p), whole(p).layer(x), model.layer(x)))
        return tanh(x) - tanh(2 * x + 1) if isinstance(model, Twice) else tanh(x)

    return with_statistics if held else lambda p: whole(p)(x), parameters


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_held_or_it_is_said(name):
    make, held, said = MODELS[name]
    model, x, y = make(), normal(6, 3), normal(6, 4, seed=1)
    d = lnp.decompose(model, (x, y), estimator="exact", population=False)
    function, parameters = function_of(model, x, held)
    agrees(d, dense(function, parameters, lambda outputs: jnp.mean((outputs - y) ** 2), y.size))
    assert [any(text in note for note in d.notes) for text in said] == [True] * len(said), d.notes
    assert (NOTE in d.notes) == held
    assert len(d.notes) == len(said) + held


def test_what_is_measured_in_other_ways_holds_them_too():
    model, x, y = Twice(), normal(6, 3), normal(6, 4, seed=1)
    function, parameters = function_of(model, x, True)
    loss = lambda p: jnp.mean((function(p) - y) ** 2)
    moved = loss(jax.tree.map(lambda p, g: p - 0.01 * g, parameters, jax.grad(loss)(parameters)))
    change = lnp.measured_loss_change(model, (x, y), learning_rate=0.01)
    assert change == pytest.approx(float(moved - loss(parameters)), rel=1e-8)
    assert NOTE in lnp.kernel(model, (x, y)).notes
    inside = jax.jit(lambda state: lnp.decompose(nnx.merge(nnx.graphdef(model), state), (x, y), estimator="exact").rate)
    expected = dense(function, parameters, lambda outputs: jnp.mean((outputs - y) ** 2), y.size)["rate"]
    assert float(inside(nnx.state(model))) == pytest.approx(expected, rel=1e-9)


EPSILON = 1e-5


class InLinen(nn.Module):
    """Normalised over samples and places, where the backward pass computes it again."""

    @nn.compact
    def __call__(self, x):
        norm = nn.remat(nn.BatchNorm)(use_running_average=False, epsilon=EPSILON, param_dtype=jnp.float64)
        h = jnp.tanh(norm(nn.Dense(4, param_dtype=jnp.float64)(x)))
        return nn.Dense(2, param_dtype=jnp.float64)(h.sum(1))


class InEquinox(eqx.Module):
    """One sample, whose statistics are found along a named axis."""

    a: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    b: eqx.nn.Linear

    def __init__(self, mode):
        keys = jax.random.split(jax.random.key(0))
        self.a, self.b = (eqx.nn.Linear(*ends, key=key) for ends, key in zip(((3, 4), (4, 2)), keys, strict=True))
        self.norm = eqx.nn.BatchNorm(4, "batch", eps=EPSILON, mode=mode)

    def __call__(self, x, state):
        h, state = self.norm(jax.vmap(self.a)(x).T, state)
        return self.b(jnp.tanh(h).sum(1)), state


def in_linen(x):
    model = InLinen()
    variables = model.init(jax.random.key(1), x)
    names = ("Dense_0", "CheckpointBatchNorm_0", "Dense_1")
    read = lambda p: tuple(value for name in names for _, value in sorted(p["params"][name].items(), reverse=True))
    return (lambda v, x: model.apply(v, x, mutable=["batch_stats"])[0], variables), None, read, 0.0


def in_haiku(x):
    def network(x):
        h = hk.BatchNorm(True, True, 0.9, eps=EPSILON)(hk.Linear(4)(x), is_training=True)
        return hk.Linear(2)(jnp.tanh(h).sum(1))

    network = hk.transform_with_state(network)
    p, state = network.init(jax.random.key(1), x)
    parts = (("linear", "w"), ("linear", "b"), ("batch_norm", "scale"), ("batch_norm", "offset"))
    read = lambda p: tuple(p[a][b] for a, b in (*parts, ("linear_1", "w"), ("linear_1", "b")))
    return (jax.jit(lambda p, x: network.apply(p, state, None, x)[0]), p), None, read, 0.0


def in_equinox(mode, x):
    model, state = eqx.nn.make_with_state(InEquinox)(mode)
    mapped = lambda model: jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    if mode == "ema":
        _, state = mapped(model)(2 * x + 1, state)
    read = lambda m: (m.a.weight.T, m.a.bias, m.norm.weight, m.norm.bias, m.b.weight.T, m.b.bias)
    return model, lambda model, x: mapped(model)(x, state)[0], read, state


LIBRARIES = {
    "linen": in_linen,
    "haiku": in_haiku,
    "equinox": lambda x: in_equinox("batch", x),
    "equinox, averages": lambda x: in_equinox("ema", x),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library(library):
    """Against the network with its statistics as numbers; taken apart, and with the gradient of scale and shift."""
    x, y = normal(7, 5, 3), normal(7, 2, seed=1)
    model, forward, read, state = LIBRARIES[library](x)
    tree = model[1] if isinstance(model, tuple) else model
    parameters = [jnp.asarray(p) for p in read(tree)]
    h = x @ parameters[0] + parameters[1]
    mean, var = h.mean((0, 1)), h.var((0, 1))
    if library == "equinox, averages":
        before_mean, before_var = state.get(model.norm.ema_state_index)
        mean, var = (0.99 * old + 0.01 * new for old, new in ((before_mean, mean), (before_var, var)))

    def function(p):
        h = (x @ p[0] + p[1] - mean) / jnp.sqrt(var + EPSILON) * p[2] + p[3]
        return jnp.tanh(h).sum(1) @ p[4] + p[5]

    expected = dense(function, parameters, lambda outputs: jnp.mean((outputs - y) ** 2), y.size)
    d = lnp.decompose(model, (x, y), forward=forward, estimator="per_sample", rtol=0.02)
    assert d.notes == (NOTE,)
    assert d.population is not None
    assert (d.loss, d.rate) == pytest.approx((expected["loss"], expected["rate"]), rel=1e-9)
    assert abs(d.chi_net - expected["chi_net"]) <= 5 * d.chi_net_stderr + 1e-9 * expected["chi_net"]
    if library == "haiku":
        part = lnp.decompose(model, (x, y), estimator="per_sample", microbatch=3, population=False)
        assert part.rate == pytest.approx(expected["rate"], rel=1e-9)
        coupled = lnp.decompose(model, (x, y), batch_statistics="coupled", estimator="exact", population=False)
        assert NOTE not in coupled.notes
        assert any("interact" in note for note in coupled.notes)


def readout(w, x):
    """A graph's: every node sees the mean of all, which is no running average, beside what is closed over."""
    h = jnp.tanh(x @ w)
    return h + 0.5 * h.mean(0) + 0.5 * OFFSET


def by_hand(w, x):
    h = x @ w
    return (h - h.mean(0)) / h.std(0)


def of_other_programs(state, w, x):
    """Its program for one sample is another one."""
    h = x @ w
    mean = h.mean(0) if len(x) > 1 else h[0] * 1.0
    return jnp.tanh(h - mean), 0.9 * state + 0.1 * mean


OFFSET = normal(4, seed=3)
COUPLED = {"a readout": readout, "by hand": by_hand}


@pytest.mark.parametrize("name", COUPLED)
def test_reductions_over_samples_that_nothing_keeps_are_differentiated(name):
    w, x, y = normal(3, 4), normal(6, 3, seed=1), normal(6, 4, seed=2)
    d = lnp.decompose((COUPLED[name], w), (x, y), estimator="exact")
    agrees(d, dense(lambda w: COUPLED[name](w, x), w, lambda outputs: jnp.mean((outputs - y) ** 2), y.size))
    assert NOTE not in d.notes
    assert any("not taken apart" in note for note in d.notes)


def test_a_network_that_is_another_one_for_a_single_sample_is_not_taken_apart():
    w, x, y = normal(3, 4), normal(6, 3, seed=1), normal(6, 4, seed=2)
    d = lnp.decompose((lambda w, x: of_other_programs(OFFSET, w, x)[0], w), (x, y), estimator="exact")
    mean = (x @ w).mean(0)
    agrees(d, dense(lambda w: jnp.tanh(x @ w - mean), w, lambda outputs: jnp.mean((outputs - y) ** 2), y.size))
    assert NOTE in d.notes
    assert any("in another way for another number of samples" in note for note in d.notes)
