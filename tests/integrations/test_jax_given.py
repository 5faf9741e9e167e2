"""What people give: parameters in trees of any kind, complex numbers, functions that hide what they call."""

from __future__ import annotations

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import lnp
import lnp_jax
from integrations.jax_reference import agrees, dense


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)  # JAX's would be in float32 here


def drawn(*shape, seed=0):
    return normal(*shape, seed=seed) + 1j * normal(*shape, seed=seed + 1)


def mean_square(y):
    return lambda outputs: jnp.mean(jnp.abs(outputs - y) ** 2)


X, Y = normal(5, 3), normal(5, 2, seed=1)


# Complex numbers: real and imaginary parts are two real ones each.


def spectral(p, x):
    """A layer that filters frequencies, as a Fourier neural operator has it."""
    frequencies = jnp.fft.rfft(jnp.tanh(x @ p["lift"]), axis=1) * p["filter"]
    return jnp.fft.irfft(frequencies, n=4, axis=1) @ p["out"]


def state_space(p, x):
    """Complex eigenvalues inside of a scan."""

    def step(h, u):
        h = p["a"] * h + u[:, None] * p["b"]
        return h, jnp.real(h @ p["c"])

    return jax.lax.scan(step, jnp.zeros((len(x), 2), complex), x.T)[1].transpose(1, 0)[:, :2]


def wave(p, x):
    return (x @ p["w"]) * jnp.exp(1j * (x @ p["v"]))


def beside(p, x):
    return {"amplitude": x @ p["w"], "phase": wave(p, x)}


def both(p, x):
    return x @ p["w"]


COMPLEX = {
    "filter": (spectral, {"lift": normal(3, 4), "filter": drawn(3), "out": normal(4, 2)}),
    "recurrent": (state_space, {"a": 0.5 * drawn(2), "b": drawn(2, seed=2), "c": drawn(2, seed=4)}),
    "outputs": (wave, {"w": normal(3, 2), "v": normal(3, 2, seed=1)}),
    "outputs and parameters": (both, {"w": drawn(3, 2)}),
    "beside real ones": (beside, {"w": normal(3, 2), "v": normal(3, 2, seed=1)}),
}


def as_real(a):
    return jnp.stack([a.real, a.imag], -1) if jnp.iscomplexobj(a) else a


def distance(outputs, y):
    return sum(jnp.mean(jnp.abs(leaf - y) ** 2) for leaf in jax.tree.leaves(outputs))


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers(name):
    apply, p = COMPLEX[name]
    d = lnp.decompose((apply, p), (X, Y), distance, loss_terms=10, estimator="exact", by_layer=str)
    tree = apply(p, X)

    def back(real, like):
        return jax.lax.complex(real[..., 0], real[..., 1]) if jnp.iscomplexobj(like) else real

    def flat(real):
        outputs = apply(jax.tree.map(back, real, p), X)
        return jnp.concatenate([as_real(leaf).reshape(5, -1) for leaf in jax.tree.leaves(outputs)], 1)

    def loss(flat):
        ends = np.cumsum([as_real(leaf).reshape(5, -1).shape[1] for leaf in jax.tree.leaves(tree)])[:-1]
        leaves = [
            back(part.reshape(as_real(leaf).shape), leaf)
            for part, leaf in zip(jnp.split(flat, ends, 1), jax.tree.leaves(tree), strict=True)
        ]
        return distance(jax.tree.unflatten(jax.tree.structure(tree), leaves), Y)

    agrees(d, dense(flat, jax.tree.map(as_real, p), loss, 10))
    assert set(d.layers) == set(p)
    gradient = jax.grad(lambda p: distance(apply(p, X), Y))(p)
    update = jax.tree.map(lambda g: -1e-3 * jnp.conj(g), gradient)  # JAX's is the conjugate of the steepest direction
    for change in (lnp.predicted_loss_change, lnp.measured_loss_change):
        expected = change((apply, p), (X, Y), distance, learning_rate=1e-3)
        assert change((apply, p), (X, Y), distance, update=update) == pytest.approx(expected, rel=1e-9)
    ones = jax.tree.map(lambda a: jnp.ones(a.shape), p)
    again = lnp.decompose((apply, p), (X, Y), distance, loss_terms=10, estimator="exact", preconditioner=ones)
    assert (again.rate, again.chi_net) == pytest.approx((d.rate, d.chi_net))


def test_complex_numbers_without_a_loss_for_them():
    apply, p = COMPLEX["outputs"]
    with pytest.raises(ValueError, match=r"complex.*Expected a function loss\(outputs, targets\)"):
        lnp.decompose((apply, p), (X, Y))
    with pytest.raises(ValueError, match=r"loss is of type complex128\. Expected a real number"):
        lnp.decompose((apply, p), (X, Y), lambda outputs, y: jnp.mean((outputs - y) ** 2))


# What is no parameter is not taken for one.


class Net(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(4)(x))
        steps = self.variable("counters", "steps", jnp.zeros, (2,))
        return linen.Dense(2)(jnp.tanh(x)) + steps.value


NET = Net()
VARIABLES = jax.tree.map(lambda leaf: leaf + 0.1, NET.init(jax.random.key(0), X))
REST = {name: value for name, value in VARIABLES.items() if name != "params"}


def hidden(x, training=False):
    h = hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), is_training=training)
    return hk.Linear(2)(jnp.tanh(h))


HAIKU = hk.transform_with_state(hidden)
GIVEN, STATE = HAIKU.init(jax.random.key(0), X, True)


class Wrapper:
    """An object that is called like a function."""

    def __call__(self, variables, x):
        return NET.apply(variables, x)


def made_inside(variables, x):
    return Net().apply(variables, x)


WRAPPED = {
    "partial": (functools.partial(NET.apply, train=False), VARIABLES),
    "lambda": (lambda v, x: NET.apply(v, x, False), VARIABLES),
    "compiled": (jax.jit(NET.apply), VARIABLES),
    "compiled lambda in a partial": (functools.partial(jax.jit(lambda v, x, k: k * NET.apply(v, x)), k=1.0), VARIABLES),
    "an object": (Wrapper(), VARIABLES),
    "made inside": (made_inside, VARIABLES),
    "cast first": (lambda v, x: NET.apply(jax.tree.map(lambda a: 1.0 * a, v), x), VARIABLES),
    "as a pair": (lambda pv, x: NET.apply({"params": pv[0], **pv[1]}, x), (VARIABLES["params"], REST)),
    "as a pair, compiled": (
        jax.jit(lambda pv, x: NET.apply({"params": pv["p"], **pv["rest"]}, x)),
        {"p": VARIABLES["params"], "rest": REST},
    ),
    "Haiku": (lambda ps, x: HAIKU.apply(*ps, None, x)[0], (GIVEN, STATE)),
    "Haiku, compiled": (jax.jit(lambda ps, x: HAIKU.apply(ps["p"], ps["s"], None, x)[0]), {"p": GIVEN, "s": STATE}),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_states_are_no_parameters(name):
    function, given = WRAPPED[name]
    d = lnp.decompose((function, given), (X, Y), estimator="exact", by_layer=True, population=False)
    if name.startswith("Haiku"):
        expected = dense(lambda p: HAIKU.apply(p, STATE, None, X)[0], GIVEN, mean_square(Y), 10)
    else:
        expected = dense(lambda p: NET.apply({"params": p, **REST}, X), VARIABLES["params"], mean_square(Y), 10)
    agrees(d, expected, jnp.float32)
    assert d.notes == ()
    assert len(d.layers) == 3


def test_what_cannot_be_followed_is_said():
    squared = lambda ps, x: NET.apply({"params": ps[0], **jax.tree.map(jnp.square, ps[1])}, x)
    d = lnp.decompose((squared, (VARIABLES["params"], REST)), (X, Y), population=False)
    assert any("taken for parameters were" in note for note in d.notes)


def test_variables_of_other_kinds():
    """NNX and Equinox say by their types what is no parameter."""

    class Small(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
            self.seen = nnx.BatchStat(jnp.ones(2))

        def __call__(self, x):
            return self.layer(x) * self.seen[...]

    graph, state = nnx.split(Small())
    expected = lnp.decompose(Small(), (X, Y), estimator="exact")
    d = lnp.decompose((lambda s, x: nnx.merge(graph, s)(x), state), (X, Y), estimator="exact")
    assert (d.rate, d.chi_net) == pytest.approx((expected.rate, expected.chi_net), rel=1e-6)

    class Running(eqx.Module):
        layer: eqx.nn.Linear
        index: eqx.nn.StateIndex

        def __init__(self):
            self.layer = eqx.nn.Linear(3, 2, key=jax.random.key(0))
            self.index = eqx.nn.StateIndex(jnp.ones(2))

        def __call__(self, x, state):
            return self.layer(x) * state.get(self.index)

    model, state = eqx.nn.make_with_state(Running)()
    with_state = lambda ls, x: jax.vmap(ls["layer"])(x) * ls["state"].get(model.index)
    d = lnp.decompose((with_state, {"layer": model.layer, "state": state}), (X, Y), estimator="exact")
    held = dense(lambda p: jax.vmap(p)(X), model.layer, mean_square(Y), 10)
    agrees(d, held, jnp.float32)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"w": normal(3, 2), "scale": 2.0}, r"scale \(float\)"),
        ({"w": normal(3, 2), "how": {"kind": "relu", "n": 3}}, r"how.kind \(str\), how.n \(int\)"),
        ([np.ones((3, 2)), True], r"1 \(bool\)"),
    ],
)
def test_leaves_that_cannot_be_used_are_named(given, named):
    with pytest.raises(ValueError, match=f"no arrays: {named}. Expected arrays"):
        lnp.decompose((lambda p, x: x @ jax.tree.leaves(p)[-1], given), (X, Y))


class Dropping(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2)(linen.Dropout(0.5, deterministic=False)(linen.Dense(8)(x)))


def dropping(x):
    return hk.Linear(2)(hk.dropout(hk.next_rng_key(), 0.5, jnp.tanh(hk.Linear(8)(x))))


@pytest.mark.parametrize("how", ["bound", "Linen", "Haiku"])
def test_streams_of_random_numbers(how):
    """One mask for the whole batch, which is that of the key."""
    key = jax.random.key(2)
    module, transformed = Dropping(), hk.transform(dropping)
    variables = module.init({"params": key, "dropout": key}, X)
    if how == "Haiku":
        variables, function = transformed.init(key, X), lambda p, x: transformed.apply(p, key, x)
    else:
        function = lambda v, x: module.apply(v, x, rngs={"dropout": key})
    model = module.bind(variables, rngs={"dropout": key}) if how == "bound" else (function, variables)
    d = lnp.decompose(model, (X, Y), estimator="exact", population=False)
    agrees(d, dense(lambda p: function(p, X), variables, mean_square(Y), 10), jnp.float32)
    assert any("interact" in note for note in d.notes)
    # but for rounding, which is another one in another program; another mask would change the loss by a tenth
    assert abs(lnp.step_taken(lnp.snapshot(model), model, (X, Y)).measured) < 1e-7


def test_a_step_refuses_what_it_would_train_and_should_not():
    with pytest.raises(ValueError, match=r"not trained: .*batch_stats"):
        lnp_jax.value_and_grad(WRAPPED["lambda"][0])(VARIABLES, (X, Y), jax.random.key(0))
