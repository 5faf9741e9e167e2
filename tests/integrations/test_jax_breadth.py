"""Layers and ways to put them together, against a dense Jacobian: 1e-5 relative in float32, 1e-10 in float64."""

from __future__ import annotations

from dataclasses import dataclass

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import lnp
import lnp_jax
from integrations.jax_reference import cross_entropy, dense, factors, linearized
from lnp.contract.options import Options
from lnp.results.decomposition import decompose

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def tokens(*shape, high=7):
    return np.random.default_rng(0).integers(0, high, shape)


class Then(nnx.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, run, **layers):
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def __call__(self, x):
        return self.run(self, x)


def rngs():
    return nnx.Rngs(0)


def through(layer, *more):
    """Layers one after the other, and the outputs of a sample in one row."""
    layers = (layer, *more)

    def run(m, x):
        for index in range(len(layers)):
            x = getattr(m, f"layer{index}")(x)
        return x.reshape(x.shape[0], -1)

    return Then(run, **{f"layer{index}": layer for index, layer in enumerate(layers)})


def conv(*args, **kwargs):
    return lambda: through(nnx.Conv(*args, **kwargs, rngs=rngs()))


def normalised(kind, *args, **kwargs):
    return lambda: through(nnx.Linear(4, 6, rngs=rngs()), kind(6, *args, **kwargs, rngs=rngs()))


def recurrent(cell):
    return lambda: through(nnx.RNN(cell(3, 4, param_dtype=jnp.zeros(()).dtype, rngs=rngs())))


def attention(**how):
    def run(m, x):
        mask = nnx.make_causal_mask(x[..., 0]) if how.get("causal") else None
        if how.get("padded"):
            real = x[..., 0] < 0.7
            mask = nnx.make_attention_mask(jnp.ones_like(real), real)
        return m.layer(x, mask=mask)

    return lambda: Then(run, layer=nnx.MultiHeadAttention(2, 6, 6, decode=False, rngs=rngs()))


def fused(m, x):
    q, k, v = jnp.split(m.qkv(x).reshape(*x.shape[:2], 6, 3), 3, axis=2)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def tied(m, t):
    return m.table.attend(jnp.tanh(m.table(t)))


def gathered(m, x):
    """Each sample goes through one expert, whose weights are gathered."""
    chosen = (x[:, 0] > 0).astype(int)
    return jnp.einsum("ni,nio->no", x, m.experts[...][chosen]) * jax.nn.softmax(m.gate(x))[:, :1]


def counted(m, x):
    m.calls[...] += 1
    return m.layer(x)


def complex_inside(m, x):
    return m.out(jnp.abs(jnp.fft.rfft(m.into(x))))


def checkpointed(m, x):
    return nnx.remat(lambda layer, x: jnp.tanh(layer(x)))(m.layer, x)


def shared(m, x):
    return m.head(jnp.tanh(m.layer(jnp.tanh(m.layer(x)))))


NNX = {
    "conv1d, dilated": (conv(2, 3, (3,), kernel_dilation=2), normal(4, 8, 2)),
    "conv2d, grouped": (conv(4, 4, (2, 2), feature_group_count=2), normal(3, 4, 4, 4)),
    "conv2d, depthwise, strided": (conv(3, 6, (3, 3), strides=2, feature_group_count=3), normal(3, 4, 4, 3)),
    "conv3d": (conv(1, 2, (2, 2, 2)), normal(3, 3, 3, 2, 1)),
    "transposed conv": (
        lambda: through(nnx.ConvTranspose(2, 3, (2, 2), strides=(2, 2), rngs=rngs())),
        normal(3, 2, 3, 2),
    ),
    "layer norm": (normalised(nnx.LayerNorm), normal(4, 4)),
    "group norm": (normalised(nnx.GroupNorm, 2), normal(4, 4)),
    "instance norm": (
        lambda: through(nnx.Conv(2, 3, (2,), rngs=rngs()), nnx.InstanceNorm(3, rngs=rngs())),
        normal(3, 4, 2),
    ),
    "RMS norm": (normalised(nnx.RMSNorm), normal(4, 4)),
    "batch norm, evaluated": (normalised(nnx.BatchNorm, use_running_average=True), normal(4, 4)),
    "LSTM": (recurrent(nnx.OptimizedLSTMCell), normal(3, 4, 3)),
    "GRU": (recurrent(nnx.GRUCell), normal(3, 4, 3)),
    "embedding with a tied head": (
        lambda: Then(tied, table=nnx.Embed(7, 4, dtype=jnp.zeros(()).dtype, rngs=rngs())),
        tokens(3, 2),
    ),
    "attention": (attention(), normal(3, 4, 6)),
    "causal attention": (attention(causal=True), normal(3, 4, 6)),
    "padded attention": (attention(padded=True), normal(3, 4, 6)),
    "fused causal attention": (lambda: Then(fused, qkv=nnx.Linear(6, 18, rngs=rngs())), normal(3, 4, 6)),
    "weight norm": (lambda: through(nnx.WeightNorm(nnx.Linear(4, 3, rngs=rngs()), rngs=rngs())), normal(4, 4)),
    "mixture of experts, gathered": (
        lambda: Then(gathered, experts=nnx.Param(jnp.asarray(normal(2, 4, 3))), gate=nnx.Linear(4, 2, rngs=rngs())),
        normal(5, 4),
    ),
    "state that is written": (
        lambda: Then(counted, layer=nnx.Linear(4, 3, rngs=rngs()), calls=nnx.Variable(jnp.asarray(0))),
        normal(4, 4),
    ),
    "complex inside": (
        lambda: Then(complex_inside, into=nnx.Linear(4, 4, rngs=rngs()), out=nnx.Linear(3, 2, rngs=rngs())),
        normal(4, 4),
    ),
    "checkpointed": (lambda: Then(checkpointed, layer=nnx.Linear(4, 3, rngs=rngs())), normal(4, 4)),
    "one layer twice": (
        lambda: Then(shared, layer=nnx.Linear(4, 4, rngs=rngs()), head=nnx.Linear(4, 3, rngs=rngs())),
        normal(4, 4),
    ),
}
ATTENTION = ("attention", "causal attention", "padded attention", "fused causal attention")
"""JAX's own attention takes its softmax in float32 whatever the inputs are: compared in float32 only."""
NARROW = ("conv2d, grouped", "LSTM", "embedding with a tied head", *ATTENTION)
"""Compared in float32."""


def cast(tree, dtype):
    floating = lambda leaf: hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype) if floating(leaf) else leaf, tree)


def host(state):
    """Arrays and random keys as NumPy."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda leaf: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf), state)


def squared(y):
    return lambda outputs: jnp.mean((outputs - y) ** 2)


def agrees(d, expected, dtype):
    assert {name: getattr(d, name) for name in expected} == pytest.approx(expected, rel=TOLERANCE[dtype])


def check(model, function, parameters, x, dtype):
    """The decomposition of `model` beside that of function(parameters)."""
    out = jax.eval_shape(function, parameters)
    y = jnp.asarray(np.random.default_rng(1).standard_normal(out.shape), dtype)
    d, v, norms = lnp_jax.evaluate(decomposed_and_probed, model, ((x, y),), Options())
    found = linearized(function, parameters, squared(y))
    agrees(d, factors(*found, y.size), dtype)
    assert d.probes == y[0].size, d.notes  # the samples were taken apart
    assert not [note for note in d.notes if "run on their own" in note]
    for of_leaf, columns in zip(norms, found[2], strict=True):
        gradients = np.einsum("nk,nkp->np", v, columns.reshape(*v.shape, -1))  # single samples' own
        expected = np.sum(gradients**2, axis=1)
        np.testing.assert_allclose(of_leaf, expected, TOLERANCE[dtype], TOLERANCE[dtype] * np.max(norms))


def decomposed_and_probed(lin):
    """The decomposition, random signs, and each parameter's squared norms for them, in their order: one program."""
    signs = lin.signs(0)
    return decompose(lin, estimator="exact"), signs, jnp.stack(list(lin.sample_square_norms(signs).values()))


@pytest.mark.parametrize(
    ("name", "dtype"), [*((n, "float64") for n in NNX if n not in ATTENTION), *((n, "float32") for n in NARROW)]
)
def test_nnx(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        build, x = NNX[name]
        model, x = build(), jnp.asarray(cast(x, dtype))
        nnx.update(model, cast(nnx.state(model), dtype))
        before = host(nnx.state(model))
        graph, parameters, rest = nnx.split(model, nnx.Param, ...)
        check(model, lambda p: nnx.merge(graph, p, rest, copy=True)(x), parameters, x, dtype)
        assert jax.tree.all(jax.tree.map(np.array_equal, before, host(nnx.state(model))))


class Linen(linen.Module):
    kind: str

    @linen.compact
    def __call__(self, x):
        how = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        if self.kind == "conv":
            x = linen.GroupNorm(2, **how)(linen.Conv(4, (3, 3), feature_group_count=2, kernel_dilation=2, **how)(x))
            x = linen.ConvTranspose(2, (2, 2), **how)(x)
        elif self.kind == "recurrent":
            x = linen.RNN(linen.GRUCell(4, **how))(linen.RNN(linen.OptimizedLSTMCell(4, **how))(x))
        elif self.kind == "attention":
            x = x + linen.MultiHeadDotProductAttention(2, **how)(
                linen.LayerNorm(**how)(x), mask=linen.make_causal_mask(x[..., 0])
            )
            x = linen.WeightNorm(linen.Dense(3, **how), param_dtype=jnp.float64)(linen.RMSNorm(**how)(x))
        elif self.kind == "tokens":
            table = linen.Embed(7, 4, **how)
            x = table.attend(jnp.tanh(table(x)))
        else:
            x = linen.BatchNorm(use_running_average=True, **how)(linen.remat(linen.Dense)(3, **how)(x))
        return x.reshape(x.shape[0], -1)


LINEN = {
    "conv": normal(3, 5, 5, 4),
    "recurrent": normal(3, 4, 3),
    "attention": normal(3, 4, 6),
    "tokens": tokens(3, 2),
    "batch norm": normal(4, 4),
}


@pytest.mark.parametrize("kind", LINEN)
def test_linen(kind):
    with jax.enable_x64(True):
        x = jnp.asarray(LINEN[kind])
        module = Linen(kind)
        variables = module.init(jax.random.key(0), x)
        rest = {name: value for name, value in variables.items() if name != "params"}
        before = jax.tree.map(np.asarray, variables)
        check(
            module.bind(variables), lambda p: module.apply({"params": p} | rest, x), variables["params"], x, "float64"
        )
        assert jax.tree.all(jax.tree.map(np.array_equal, before, variables))


class Equinox(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    cell: eqx.nn.GRUCell

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 3)
        self.conv = eqx.nn.Conv2d(2, 4, 2, groups=2, key=keys[0])
        self.norm = eqx.nn.LayerNorm(4)
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=keys[1])
        self.cell = eqx.nn.GRUCell(4, 3, key=keys[2])

    def __call__(self, x):
        rows = jax.vmap(self.norm)(self.conv(x).reshape(4, -1).T)
        rows = self.attention(rows, rows, rows)
        state, _ = jax.lax.scan(lambda state, row: (self.cell(row, state), None), jnp.zeros(3, x.dtype), rows)
        return state


def test_equinox():
    with jax.enable_x64(True):
        model, x = cast(Equinox(), "float64"), jnp.asarray(normal(3, 2, 3, 3))
        arrays, static = eqx.partition(model, eqx.is_inexact_array)
        y = jnp.asarray(normal(3, 3))
        d = lnp.decompose(model, (x, y), forward=vectorized, estimator="exact")
        agrees(d, dense(lambda p: jax.vmap(eqx.combine(p, static))(x), arrays, squared(y), 9), "float64")
        assert d.probes == 3


def vectorized(model, x):
    return jax.vmap(model)(x)


def test_haiku():
    def network(x):
        x = hk.Conv2D(3, 2)(x)
        x = hk.LayerNorm(-1, True, True)(jnp.tanh(hk.DepthwiseConv2D(1, 2)(x)))
        x = hk.MultiHeadAttention(2, 2, w_init=hk.initializers.VarianceScaling())(*[x.reshape(len(x), -1, 3)] * 3)
        return hk.dynamic_unroll(hk.LSTM(3), x, hk.LSTM(3).initial_state(len(x)), time_major=False)[0]

    with jax.enable_x64(True):
        transformed = hk.without_apply_rng(hk.transform(network))
        x = jnp.asarray(normal(3, 4, 4, 2))
        parameters = cast(transformed.init(jax.random.key(0), x), "float64")
        check((transformed.apply, parameters), lambda p: transformed.apply(p, x), parameters, x, "float64")


def test_low_rank_adapter_with_a_frozen_base():
    with jax.enable_x64(True):
        model = nnx.LoRA(4, 2, 3, base_module=nnx.Linear(4, 3, rngs=rngs()), rngs=rngs())
        nnx.update(model, cast(nnx.state(model), "float64"))
        model.lora_b[...] = jnp.asarray(normal(2, 3))
        x, y = jnp.asarray(normal(5, 4)), jnp.asarray(normal(5, 3))
        d = lnp.decompose(model, (x, y), parameters="lora_*", estimator="exact")
        graph, adapter, rest = nnx.split(model, nnx.LoRAParam, ...)
        expected = dense(lambda p: nnx.merge(graph, p, rest, copy=True)(x), adapter, squared(y), 15)
        agrees(d, expected, "float64")


@jax.tree_util.register_dataclass
@dataclass
class Answer:
    first: jax.Array
    second: list


def answer(p, inputs):
    return Answer(inputs["a"] @ p["w"], [jnp.tanh(inputs["b"] @ p["w"]), jnp.arange(3)])


def joined(out):
    return jnp.concatenate([out.first, out.second[0]], axis=1)


def answer_loss(out, y):
    return jnp.mean((joined(out) - y) ** 2)


def test_dataclass_outputs():
    with jax.enable_x64(True):
        x = {"a": jnp.asarray(normal(4, 3)), "b": jnp.asarray(normal(4, 3)) + 1}
        p, y = {"w": jnp.asarray(normal(3, 2))}, jnp.asarray(normal(4, 4))
        d = lnp.decompose((answer, p), (x, y), answer_loss, loss_terms=16, estimator="exact")
        agrees(d, dense(lambda p: joined(answer(p, x)), p, squared(y), 16), "float64")
        assert (d.outputs, d.probes) == (4, 4)


def test_bfloat16_with_float32_parameters():
    """bfloat16 rounds to 3 digits: 2% beside the same network in full precision."""
    make = lambda dtype: nnx.Sequential(
        nnx.Linear(8, 32, dtype=dtype, rngs=rngs()), jnp.tanh, nnx.Linear(32, 3, dtype=dtype, rngs=nnx.Rngs(1))
    )
    x, y = jnp.asarray(normal(16, 8), jnp.float32), jnp.arange(16) % 3
    d = lnp.decompose(make(jnp.bfloat16), (x, y), estimator="exact")
    graph, parameters, rest = nnx.split(make(jnp.float32), nnx.Param, ...)
    expected = dense(lambda p: nnx.merge(graph, p, rest, copy=True)(x), parameters, cross_entropy(y), 16)
    assert {name: getattr(d, name) for name in expected} == pytest.approx(expected, rel=0.02)
    assert d.probes == 3, d.notes
    assert d.chi_net != pytest.approx(expected["chi_net"], rel=1e-5)  # it did run in bfloat16
