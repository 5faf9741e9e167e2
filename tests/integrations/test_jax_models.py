"""Models that people have, against a dense Jacobian: 1e-5 relative in float32, 1e-10 in float64."""

from __future__ import annotations

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import lnp
from integrations.jax_reference import TOLERANCE, agrees, cast, cross_entropy, dense
from lnp_jax import model as jax_model
from lnp_jax import self_check


@pytest.fixture(autouse=True)
def dtype(request):
    """float64, unless a test asks for both."""
    chosen = getattr(request, "param", jnp.float64)
    with jax.enable_x64(chosen == jnp.float64):
        yield chosen


in_both = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"], indirect=True)


def batch(dtype, *shape, classes=3):
    generator = np.random.default_rng(0)
    return jnp.asarray(generator.standard_normal(shape), dtype), jnp.asarray(generator.integers(0, classes, shape[0]))


class CNN(nnx.Module):
    def __init__(self, norm, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = norm
        self.second = nnx.Conv(4, 4, (2, 2), strides=2, feature_group_count=2, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = self.second(nnx.max_pool(x, (2, 2), strides=(2, 2)))
        return self.head(x.reshape(x.shape[0], -1))


def frozen_reference(model, x):
    """The model with batch statistics that were computed here, from what its norm layer sees."""
    twin = nnx.clone(model)
    seen = twin.conv(x)
    twin.norm.mean[...], twin.norm.var[...] = seen.mean((0, 1, 2)), seen.var((0, 1, 2))
    twin.norm.use_running_average = True
    return twin


@in_both
@pytest.mark.parametrize("kind", ["group", "batch"])
def test_nnx_cnn(kind, dtype):
    rngs = nnx.Rngs(0)
    norm = nnx.GroupNorm(4, 2, rngs=rngs) if kind == "group" else nnx.BatchNorm(4, rngs=rngs)
    model = CNN(norm, rngs)
    nnx.update(model, cast(nnx.state(model), dtype))
    x, y = batch(dtype, 5, 8, 8, 1)
    before = jax.tree.map(np.asarray, nnx.state(model))
    d = lnp.decompose(model, (x, y), estimator="exact")
    assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.tree.map(np.asarray, nnx.state(model))))
    reference = model if kind == "group" else frozen_reference(model, x)
    graph, parameters, rest = nnx.split(reference, nnx.Param, ...)
    function = lambda p: nnx.merge(graph, p, rest, copy=True)(x)
    agrees(d, dense(function, parameters, cross_entropy(y), 5), dtype)
    assert d.probes == 3, d.notes
    assert any("batch normalisation" in note for note in d.notes) == (kind == "batch")


def test_nnx_dropout_goes_joint_and_leaves_the_random_state():
    class Dropping(nnx.Module):
        def __init__(self, rngs):
            self.layer, self.dropout = nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.layer(x))

    model = Dropping(nnx.Rngs(0))
    x, y = batch(jnp.float32, 6, 4)
    before = int(model.dropout.rngs.count[...])
    d = lnp.decompose(model, (x, y), estimator="exact")
    assert int(model.dropout.rngs.count[...]) == before
    assert d.probes == 18
    assert any("interact" in note for note in d.notes)
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    expected = dense(lambda p: nnx.merge(graph, p, rest, copy=True)(x), parameters, cross_entropy(y), 6)
    agrees(d, expected, jnp.float32)


NAMED = {
    "a collection beside its entry": ({"params": {"w": 3}, "w": 4}, ["params.w", "w"]),
    "nested beside dotted": ({"enc": {"w": 3}, "enc.w": 4}, ["['enc']['w']", "['enc.w']"]),
    "a list entry beside dotted": ({"a": [3], "a.0": 4}, ["['a'][0]", "['a.0']"]),
    "as JAX writes it": ({"['a']": 3, "a": 4}, ["['a']", "a"]),
    "all of them": (
        {"['a']['b']": 2, "a": {"b": 3}, "a.b": 4, "params": {"a.b": 5}},
        ["['a']['b']", "['a']['b'] #1", "['a.b']", "params.a.b"],
    ),
}  # fmt: skip
"""Trees of parameters whose names are the same when written with dots, by their numbers of columns; and their names."""


def chained(p, x):
    return jnp.concatenate([jnp.tanh(x @ w) for w in jax.tree.leaves(p)], axis=1)


def by_parameter(name):
    return name


@pytest.mark.parametrize("case", NAMED)
def test_parameters_are_told_apart_by_their_paths(case):
    columns, names = NAMED[case]
    draw = np.random.default_rng(1).standard_normal
    p = jax.tree.map(lambda size: jnp.asarray(draw((4, size))), columns)
    x, y = batch(jnp.float64, 5, 4)
    d = lnp.decompose((chained, p), (x, y), estimator="exact", by_layer=by_parameter)
    agrees(d, dense(lambda p: chained(p, x), p, cross_entropy(y), 5), jnp.float64)
    assert sorted(d.layers) == sorted(names)
    gradient = jax.grad(lambda p: cross_entropy(y)(chained(p, x)))(p)
    for update in (gradient, dict(zip(names, jax.tree.leaves(gradient), strict=True))):
        assert lnp.predicted_loss_change((chained, p), (x, y), update=update) == pytest.approx(d.rate, rel=1e-10)


class Perceptron(linen.Module):
    dtype: type

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(8, param_dtype=self.dtype)(x)
        return linen.Dense(3, param_dtype=self.dtype)(jnp.tanh(x))


@pytest.mark.parametrize("bound", [True, False])
def test_linen(bound, dtype):
    module = Perceptron(dtype)
    x, y = batch(dtype, 5, 4)
    variables = module.init(jax.random.key(0), x)
    model = module.bind(variables) if bound else (module.apply, variables)
    d = lnp.decompose(model, (x, y), estimator="exact", by_layer=True)
    agrees(d, dense(lambda p: module.apply(p, x), variables, cross_entropy(y), 5), dtype)
    assert set(d.layers) == {"Dense_0", "Dense_1"}


def test_linen_batch_statistics_are_read_and_never_changed():
    class Normed(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.BatchNorm(use_running_average=not train)(linen.Dense(5)(x))
            return linen.Dense(3)(x)

    module, (x, y) = Normed(), batch(jnp.float32, 6, 4)
    variables = module.init(jax.random.key(0), x, train=False)
    still = lnp.decompose(module.bind(variables), (x, y), forward=evaluating, estimator="exact")
    how = {"batch_statistics": "coupled", "estimator": "exact"}
    moving = lnp.decompose(module.bind(variables), (x, y), forward=training, **how)
    parameters = variables["params"]
    rest = {"batch_stats": variables["batch_stats"]}
    agrees(
        still,
        dense(lambda p: module.apply({"params": p} | rest, x, False), parameters, cross_entropy(y), 6),
        jnp.float32,
    )
    coupled = lambda p: module.apply({"params": p} | rest, x, True, mutable=["batch_stats"])[0]
    assert any("interact" in note for note in moving.notes)
    agrees(moving, dense(coupled, parameters, cross_entropy(y), 6), jnp.float32)
    assert (still.probes, moving.probes) == (3, 18)


def evaluating(module, x):
    return module(x, train=False)


def training(module, x):
    return module(x, train=True)


def vectorized(model, x):
    return jax.vmap(model)(x)


def test_equinox_mlp(dtype):
    model = cast(eqx.nn.MLP(4, 3, 8, 2, key=jax.random.key(0)), dtype)
    x, y = batch(dtype, 5, 4)
    d = lnp.decompose(model, (x, y), forward=vectorized, estimator="exact")
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    function = lambda p: jax.vmap(eqx.combine(p, static))(x)
    agrees(d, dense(function, arrays, cross_entropy(y), 5), dtype)


def test_haiku_mlp(dtype):
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 3])(x)))
    x, y = batch(dtype, 5, 4)
    parameters = network.init(jax.random.key(0), x)
    d = lnp.decompose((network.apply, parameters), (x, y), estimator="exact", by_layer=True)
    agrees(d, dense(lambda p: network.apply(p, x), parameters, cross_entropy(y), 5), dtype)
    assert len(d.layers) == 2


def normalized(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def transformer(parameters, tokens):
    """One block with causal attention of two heads; the head is the embedding."""
    x = parameters["embedding"][tokens]
    q, k, v = jnp.einsum("ntd,sdhe->snthe", normalized(x) * parameters["scale"], parameters["qkv"])
    scores = jnp.einsum("nthe,nshe->nhts", q, k) / 2.0
    mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    x = x + jnp.einsum("nhts,nshe,hed->ntd", weights, v, parameters["out"])
    x = x + jax.nn.gelu(normalized(x) @ parameters["up"]) @ parameters["down"]
    return x @ parameters["embedding"].T


@in_both
def test_transformer_with_tied_head(dtype):
    generator = np.random.default_rng(0)
    shapes = {"embedding": (7, 8), "scale": (8,), "qkv": (3, 8, 2, 4), "out": (2, 4, 8), "up": (8, 16), "down": (16, 8)}
    parameters = {n: jnp.asarray(0.5 * generator.standard_normal(s), dtype) for n, s in shapes.items()}
    tokens = jnp.asarray(generator.integers(0, 7, (3, 4)))
    labels = tokens.at[0, 2:].set(-100)
    d = lnp.decompose((transformer, parameters), (tokens, labels), estimator="exact")
    kept = np.argwhere(np.asarray(labels) >= 0)
    rows = lambda values: values[kept[:, 0], kept[:, 1]]
    loss = lambda outputs: cross_entropy(rows(labels))(rows(outputs))
    agrees(d, dense(lambda p: transformer(p, tokens), parameters, loss, 10), dtype)
    assert (d.loss_terms, d.probes) == (10, 28)


def test_parameters_wider_than_the_outputs():
    with jax.enable_x64(True):
        x, y = batch(jnp.float32, 5, 4)
        wide = {"w": jnp.ones((4, 3), jnp.float64)}
        d = lnp.decompose((narrowing, wide), (x, y), estimator="exact", by_layer=True)
        agrees(d, dense(lambda p: narrowing(p, x), wide, cross_entropy(y), 5), jnp.float32)


def narrowing(parameters, x):
    return (x @ parameters["w"]).astype(jnp.float32)


def two(parameters, inputs):
    hidden = jnp.tanh(inputs["left"] @ parameters["a"]) * inputs["scale"]
    return {"sum": hidden, "product": [hidden[:, :1] * inputs["right"], jnp.arange(3)]}


def two_loss(outputs, targets):
    return jnp.mean(outputs["sum"] ** 2) + jnp.mean(jnp.abs(outputs["product"][0] - targets["y"]))


def test_structured_inputs_outputs_and_targets(dtype):
    generator = np.random.default_rng(0)
    x = {"left": generator.standard_normal((5, 3)), "right": generator.standard_normal((5, 2)), "scale": 2.0}
    x = cast(jax.tree.map(jnp.asarray, x), dtype)
    y = {"y": jnp.ones((5, 2), dtype)}
    parameters = {
        "a": jnp.asarray(generator.standard_normal((3, 4)), dtype),
        "unused": jnp.ones(2, dtype),
        "steps": jnp.arange(3),
    }
    d = lnp.decompose((two, parameters), (x, y), two_loss, loss_terms=5, estimator="exact")
    flat = lambda p: jnp.concatenate([(out := two(p, x))["product"][0], out["sum"]], axis=1)
    loss = lambda f: two_loss({"product": [f[:, :2]], "sum": f[:, 2:]}, y)
    trained = {name: parameters[name] for name in ("a", "unused")}
    agrees(d, dense(flat, trained, loss, 5), dtype)
    assert d.probes == 6


def gated(parameters, x):
    return x @ parameters["w"] + parameters["gate"] * x.mean(0)[:3]


@pytest.mark.parametrize("estimator", ["auto", "exact", "per_sample"])
def test_coupling_behind_a_closed_gate(estimator, dtype):
    parameters = {"w": jnp.ones((4, 3), dtype), "gate": jnp.zeros((), dtype)}
    x, y = batch(dtype, 6, 4)
    d = lnp.decompose((gated, parameters), (x, y), estimator=estimator, rtol=0, max_probes=256)
    assert d.estimator == ("exact" if estimator == "exact" else "joint")
    assert any("interact" in note for note in d.notes)
    expected = dense(lambda p: gated(p, x), parameters, cross_entropy(y), 6)
    assert d.chi_net == pytest.approx(expected["chi_net"], rel=TOLERANCE[dtype], abs=5 * d.chi_net_stderr)
    if estimator == "auto":
        self_check._VERDICTS.clear()
        inside = jax.jit(lambda p: lnp.decompose((gated, p), (x, y), estimator=estimator).chi_net)(parameters)
        assert np.isnan(inside)  # nothing can be repeated there, and a wrong number must not come out


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("estimator", ["auto", "grouped"])
def test_microbatches_refuse_interacting_samples(estimator, size, dtype):
    parameters = {"w": jnp.ones((4, 3), dtype), "gate": jnp.zeros((), dtype)}
    with pytest.raises(ValueError, match=f"microbatch={size}"):
        lnp.decompose((gated, parameters), batch(dtype, 6, 4), estimator=estimator, microbatch=size)


def test_a_linen_module_beside_its_variables_is_refused():
    module = linen.Dense(2)
    x = jnp.ones((3, 4))
    with pytest.raises(ValueError, match=r"Linen module Dense .* pass \(module.apply, variables\)"):
        lnp.decompose((module, module.init(jax.random.key(0), x)), (x, jnp.zeros(3, int)))


def test_a_tree_that_jax_cannot_sort_is_another_framework_s():
    """Keys that do not compare: nothing is raised where the other framework takes them."""
    assert not jax_model.accepts((lambda p, x: x, {1: np.ones(2), "1": np.ones(2)}))
