"""Where people measure: beside steps of optax and Flax, whatever they donate and however strict JAX is."""

from __future__ import annotations

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import lnp
import lnp_jax


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X, Y, LABELS = normal(6, 4), normal(6, 3, seed=1), jnp.arange(6) % 3
KEY = jax.random.key(0)


def apply(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


def weights():
    return {"w": normal(4, 5), "v": normal(5, 3, seed=1)}


# What is measured is what one step of gradient descent does: rate = ||update||^2 / lr^2.


class Linen(linen.Module):
    dropout: float = 0.0

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(5)(x))
        x = linen.Dropout(self.dropout, deterministic=not self.dropout)(jnp.tanh(x))
        return linen.Dense(3)(x)


class NNX(nnx.Module):
    def __init__(self, norm=False):
        rngs = nnx.Rngs(0)
        self.hidden, self.head = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs) if norm else None

    def __call__(self, x):
        h = self.hidden(x)
        return self.head(jnp.tanh(h if self.norm is None else self.norm(h)))


def cross_entropy(outputs, labels):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def weighted(outputs, targets):
    return jnp.sum(targets["weight"] * jnp.sum((outputs - targets["y"]) ** 2, -1)) / jnp.sum(targets["weight"])


def smooth(outputs, labels):
    soft = optax.smooth_labels(jax.nn.one_hot(labels, 3), 0.1)
    return optax.softmax_cross_entropy(outputs, soft).mean()


def regularised(outputs, y):
    """A penalty on what the network says, as for its confidence."""
    return jnp.mean((outputs - y) ** 2) + 0.1 * jnp.mean(outputs**4)


def summed(outputs, y):
    return jnp.sum((outputs - y) ** 2)


def variables_of(module, **options):
    variables = module.init({"params": KEY, "dropout": KEY}, X, **options)
    return variables["params"], {name: value for name, value in variables.items() if name != "params"}


def of_linen(loss, targets, train=False, dropout=0.0, bound=False):
    module = Linen(dropout)
    parameters, rest = variables_of(module)

    def function(p, x):
        rngs = {"dropout": KEY} if dropout else None
        return module.apply({"params": p, **rest}, x, train, rngs=rngs, mutable=["batch_stats"] if train else [])[0]

    model = module.bind({"params": parameters, **rest}) if bound else (function, parameters)
    return model, function, parameters, loss, targets


def of_state(loss, targets):
    module = Linen()
    parameters, rest = variables_of(module)
    model = (functools.partial(module.apply, train=False), {"params": parameters, **rest})
    return model, lambda p, x: module.apply({"params": p, **rest}, x, False), parameters, loss, targets


def of_nnx(loss, targets, norm=False):
    model = NNX(norm)
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    return model, lambda p, x: nnx.merge(graph, p, rest, copy=True)(x), parameters, loss, targets


def of_equinox(loss, targets):
    mlp = eqx.nn.MLP(4, 3, 5, 1, key=KEY)
    arrays, static = eqx.partition(mlp, eqx.is_inexact_array)
    function = lambda p, x: jax.vmap(eqx.combine(p, static))(x)
    return (function, arrays), function, arrays, loss, targets


def of_haiku(loss, targets, rate=0.0):
    network = hk.transform(lambda x: hk.nets.MLP([5, 3])(x, rate or None, hk.next_rng_key() if rate else None))
    parameters = network.init(KEY, X)
    function = lambda p, x: network.apply(p, KEY, x)
    return (function, parameters), function, parameters, loss, targets


def of_function(loss, targets):
    return (apply, weights()), apply, weights(), loss, targets


WEIGHTED = {"y": Y, "weight": jnp.arange(1.0, 7.0)}
STEPS = {
    "Linen, bound": lambda: of_linen(cross_entropy, LABELS, bound=True),
    "Linen, batch norm in training": lambda: of_linen(cross_entropy, LABELS, train=True),
    "Linen, dropout": lambda: of_linen(smooth, LABELS, dropout=0.5),
    "Linen, variables in a partial": lambda: of_state(weighted, WEIGHTED),
    "NNX": lambda: of_nnx(cross_entropy, LABELS),
    "NNX, batch norm in training": lambda: of_nnx(regularised, Y, norm=True),
    "Equinox": lambda: of_equinox(smooth, LABELS),
    "Haiku": lambda: of_haiku(weighted, WEIGHTED),
    "Haiku, dropout": lambda: of_haiku(regularised, Y, 0.5),
    "function": lambda: of_function(None, LABELS),
    "function, by name": lambda: of_function("mse", Y),
    "function, a sum": lambda: of_function(summed, Y),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_rate_is_that_of_a_step(name):
    model, function, parameters, loss, targets = STEPS[name]()
    optimizer = optax.sgd(1e-2)
    known = {None: cross_entropy, "mse": lambda outputs, y: jnp.mean((outputs - y) ** 2)}.get(loss, loss)

    @jax.jit
    def step(p):
        gradient = jax.grad(lambda p: known(function(p, X), targets))(p)
        return optimizer.update(gradient, optimizer.init(p), p)[0]

    squares = sum(float(jnp.sum(u**2)) for u in jax.tree.leaves(step(parameters)))
    options = {"batch_statistics": "coupled"} if "batch norm in training" in name else {}
    d = lnp.decompose(model, (X, targets), loss, estimator="joint", max_probes=1, population=False, **options)
    assert d.rate == pytest.approx(squares / 1e-4, rel=1e-4)


# A step may give its arrays away, and the tracker still has what it needs.


def donating(p):
    return jax.tree.map(lambda a, b: a - 0.1 * b, p, jax.grad(lambda p: jnp.mean((apply(p, X) - Y) ** 2))(p))


@pytest.mark.parametrize("how", ["said after", "not said", "a module"])
def test_donated_buffers(how):
    tracker = lnp.Tracker(schedule=1, on_error="raise" if how != "not said" else "warn")
    step = jax.jit(donating, donate_argnums=0)
    if how == "a module":
        model = NNX()

        @functools.partial(nnx.jit, donate_argnums=0)
        def train(model):
            gradient = nnx.grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
            nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), gradient))

        for number in range(2):
            with tracker.step(number, model, (X, Y)):
                train(model)
        assert (tracker.history["update/measured"] < 0).all()
        return
    p, plain = weights(), weights()
    for number in range(2):
        if how == "said after":
            with tracker.step(number, (apply, p), (X, Y)) as watched:
                p = step(p)
                watched.after((apply, p))
        elif number == 0:
            with pytest.warns(UserWarning, match="donated"), tracker.step(number, (apply, p), (X, Y)):
                p = step(p)
        else:
            p = step(p)
        plain = jax.jit(donating)(plain)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(plain), strict=True))
    if how == "said after":
        assert (tracker.history["update/measured"] < 0).all()


def test_arrays_that_are_gone_are_named():
    p = weights()
    p["w"].delete()
    with pytest.raises(ValueError, match=r"deleted: \['w'\]"):
        lnp.decompose((apply, p), (X, Y))


# Derivatives that somebody wrote, in every public function.


@jax.custom_vjp
def quantised(w):
    return jnp.round(w * 8) / 8


quantised.defvjp(lambda w: (quantised.fun(w), None), lambda _, d: (d,))


@jax.custom_jvp
def softened(w):
    return jnp.where(w > 0, w, 0.1 * w)


softened.defjvp(lambda primals, tangents: (softened(*primals), jnp.where(primals[0] > 0, 1.0, 0.1) * tangents[0]))


def straight_through(p, x):
    return jnp.tanh(x @ quantised(p["w"])) @ p["v"]


def in_a_branch(p, x):
    return jax.lax.cond(p["v"][0, 0] < 9, lambda x: x @ quantised(p["w"]), lambda x: x @ p["w"], x) @ p["v"]


def in_a_loop(p, x):
    return jax.lax.scan(lambda h, _: (softened(h) + 0.1, None), x @ softened(p["w"]), length=2)[0] @ p["v"]


CUSTOM = {"straight-through": straight_through, "in a branch": in_a_branch, "custom_jvp in a loop": in_a_loop}


@pytest.mark.parametrize("name", CUSTOM)
def test_derivatives_that_somebody_wrote(name):
    model, batch, p = (CUSTOM[name], weights()), (X, Y), weights()
    outputs = lambda p: CUSTOM[name](p, X).ravel()
    columns = [np.asarray(c, np.float64).reshape(18, -1) for c in jax.tree.leaves(jax.jacrev(outputs)(p))]
    kernel = sum(j @ j.T for j in columns)
    g = np.asarray(outputs(p) - Y.ravel(), np.float64) / 9
    rate, trace = g @ kernel @ g, np.trace(kernel)
    d = lnp.decompose(model, batch, estimator="exact")
    assert (d.rate, d.chi_net * d.loss_terms) == pytest.approx((rate, trace), rel=1e-4)
    assert lnp.decompose(model, batch, microbatch=4).rate == pytest.approx(rate, rel=1e-4)
    assert lnp.cross_response(model, batch, batch).rate == pytest.approx(rate, rel=1e-4)
    assert np.trace(lnp.kernel(model, batch).matrix) == pytest.approx(trace, rel=1e-4)
    assert lnp.spectrum(model, batch).decomposition.rate == pytest.approx(rate, rel=1e-4)
    assert lnp.linear_operator(model, batch) @ g == pytest.approx(kernel @ g, rel=1e-3, abs=1e-4)
    assert lnp.predicted_loss_change(model, batch, learning_rate=1e-3) == pytest.approx(-1e-3 * rate, rel=1e-4)
    moved = jax.tree.map(lambda p, g: p - 1e-3 * g, p, jax.grad(lambda p: jnp.mean((outputs(p) - Y.ravel()) ** 2))(p))
    measured = lnp.measured_loss_change(model, batch, learning_rate=1e-3)
    tracker = lnp.Tracker(schedule=1, on_error="raise")
    with tracker.step(0, model, batch) as watched:
        watched.after((CUSTOM[name], moved))
    assert tracker.history["update/measured"][0] == pytest.approx(measured, abs=1e-6)


# Strict modes are the user's, and are kept.

STRICT = {
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_check_tracer_leaks": True,
    "jax_transfer_guard": "disallow",
    "jax_debug_nans": True,
    "jax_disable_jit": True,
}


def affine(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


@pytest.mark.parametrize("flag", STRICT)
def test_strict_modes(flag):
    model, batch = (affine, weights()), (X, LABELS)
    expected = lnp.decompose(model, batch, estimator="per_sample")  # draws signs
    before = getattr(jax.config, flag)
    jax.config.update(flag, STRICT[flag])
    try:
        d = lnp.decompose(model, batch, estimator="per_sample")
        tracker = lnp.Tracker(schedule=1, on_error="raise")
        with tracker.step(0, model, batch) as watched:
            watched.after(model)
        if flag == "jax_debug_nans":  # nothing can be estimated from one probe, which is said by nan
            assert np.isnan(lnp.decompose(model, batch, estimator="joint", max_probes=1).chi_net_stderr)
        assert getattr(jax.config, flag) == STRICT[flag]
    finally:
        jax.config.update(flag, before)
    assert (d.rate, d.chi_net) == pytest.approx((expected.rate, expected.chi_net), rel=1e-5)


def test_what_one_sample_at_a_time_is_for():
    mlp = eqx.nn.MLP(4, 3, 5, 1, key=KEY)
    with pytest.raises(ValueError, match=r"Equinox module MLP .*forward=.*jax\.vmap\(model\)"):
        lnp.decompose(mlp, (X, Y))


def test_inside_of_shard_map():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    spec = jax.sharding.PartitionSpec
    inside = lambda p, x, y: lnp_jax.decompose(apply, p, (x, y), KEY).rate[None]
    shapes = {"mesh": mesh, "in_specs": (spec(), spec("data"), spec("data")), "out_specs": spec("data")}
    rate = lnp.decompose((apply, weights()), (X, Y)).rate
    found = jax.jit(jax.shard_map(inside, **shapes, check_vma=False))(weights(), X, Y)
    assert float(found[0]) == pytest.approx(rate, rel=1e-5)
    with pytest.raises(ValueError, match=r"check_vma=True\. Expected check_vma=False"):
        jax.jit(jax.shard_map(inside, **shapes))(weights(), X, Y)
    with pytest.raises(TypeError, match=r"group='data' was given to lnp\.decompose.* call lnp_jax\.decompose"):
        lnp.decompose((apply, weights()), (X, Y), group="data")
