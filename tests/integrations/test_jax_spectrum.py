"""Spectrum, kernel and operators of JAX models against dense Jacobians; compiled once."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lnp
from integrations.jax_reference import cast, cross_entropy
from integrations.spectral_reference import check

CALLS = itertools.count()
"""Goes on where lists would be put back."""


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def mlp(p, x):
    next(CALLS)  # runs when the function is traced
    return jnp.tanh(x @ p["w"]) @ p["a"] + p["b"]


def coupled(p, x):
    out = mlp(p, x)
    return out - out.mean(0)


def scanned(p, x):
    """A recurrent network."""
    step = lambda h, part: (jnp.tanh(h @ p["u"] + part @ p["w"]), None)
    return jax.lax.scan(step, jnp.zeros((x.shape[0], 16), x.dtype), jnp.stack([x, 2 * x]))[0] @ p["a"] + p["b"]


WEIGHTS = {"w": normal(5, 16) / 2, "a": normal(16, 4, seed=1) / 4, "b": normal(4, seed=2), "u": normal(16, 16) / 4}
X, Y = normal(6, 5, seed=3), np.arange(6) % 4


def dense(function, parameters, loss):
    """(J, g)."""
    out = function(parameters)
    g = jax.grad(loss)(out).reshape(out.shape[0], -1)
    jacobian = jax.jit(jax.jacrev(lambda p: function(p).reshape(-1)))(parameters)
    return np.concatenate([np.asarray(leaf).reshape(out.size, -1) for leaf in jax.tree.leaves(jacobian)], axis=1), g


@pytest.mark.parametrize(
    ("function", "dtype"), [(mlp, "float32"), (mlp, "float64"), (coupled, "float64"), (scanned, "float64")]
)
def test_functions(function, dtype):
    with jax.enable_x64(dtype == "float64"):
        p = {name: jnp.asarray(w, dtype) for name, w in WEIGHTS.items() if name != "u" or function is scanned}
        x, y = jnp.asarray(X, dtype), jnp.asarray(Y)
        check((function, p), (x, y), None, *dense(lambda p: function(p, x), p, cross_entropy(y)), dtype)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.head = nnx.Conv(1, 4, (3, 3), rngs=rngs), nnx.Linear(64, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.conv(x)).reshape(x.shape[0], -1))


def test_nnx():
    with jax.enable_x64(True):
        model = Net(nnx.Rngs(0))
        nnx.update(model, cast(nnx.state(model), jnp.float64))
        x, y = jnp.asarray(normal(6, 4, 4, 1)), jnp.asarray(Y)
        graph, state = nnx.split(model)
        function = lambda s: nnx.merge(graph, s)(x)
        check(model, (x, y), None, *dense(function, state, cross_entropy(y)), "float64")


def test_a_second_measurement_traces_nothing():
    p = {name: jnp.asarray(w, jnp.float32) for name, w in WEIGHTS.items() if name != "u"}
    batch = (jnp.asarray(X, jnp.float32), jnp.asarray(Y))
    first = lnp.spectrum((mlp, p), batch, probes=3, steps=7)
    before = next(CALLS)
    again = lnp.spectrum((mlp, jax.tree.map(lambda w: w + 0.1, p)), batch, probes=3, steps=7, seed=1)
    assert next(CALLS) == before + 1
    assert again.first_moment != first.first_moment
    assert not np.array_equal(again.density.nodes, first.density.nodes)


def test_inside_a_compiled_function_it_says_so():
    p = {name: jnp.asarray(w, jnp.float32) for name, w in WEIGHTS.items() if name != "u"}
    batch = (jnp.asarray(X, jnp.float32), jnp.asarray(Y))
    with pytest.raises(TypeError, match="inside a compiled function"):
        jax.jit(lambda p: lnp.spectrum((mlp, p), batch).first_moment)(p)
