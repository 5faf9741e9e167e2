"""JAX: stacks of Flax's layers, of NNX and of Linen, with drawn kinds, sizes and settings."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from compared import NotBuilt, verdict
from flax import linen, nnx
from norms import Norms

import lnp
from lnp.contract.options import Options
from lnp.contract.registry import evaluate

VERSIONS = {"jax": jax.__version__, "flax": flax.__version__}
SAMPLES, LENGTH, SIDE, VOCABULARY, CLASSES = 4, 6, 8, 11, 3
ACTIVATIONS = (jax.nn.relu, jax.nn.gelu, jax.nn.silu, jnp.tanh, lambda x: jax.nn.softmax(x, axis=-1))
BATCH = "BatchNorm of the batch"
KINDS = ("vector", "image", "sequence", "tokens")


def drawn(seed: int, only: str) -> Iterator[tuple[str, Callable[[], tuple[str, str]]]]:
    """(name, its comparison) without end, NNX and Linen in turn."""
    rng = random.Random(seed)
    sources = {name: source for name, source in {"nnx": nnx_model, "linen": linen_model}.items() if only in name}
    while True:
        for name, source in sources.items():
            kind, number = rng.choice(KINDS), rng.randrange(2**31)
            build = partial(source, kind, number)
            yield f"{name} {kind} {number}", partial(compared, build, kind, number)


def nnx_model(kind: str, seed: int) -> tuple[list[str], Any, Callable, Any]:
    """(names of the layers, the module, (parameters, x) -> outputs, its parameters)."""
    rng, rngs = random.Random(seed), nnx.Rngs(seed)
    layers, width, names = [], {"vector": 5, "image": 3, "sequence": 5, "tokens": 0}[kind], []
    if kind == "tokens":
        width = rng.choice((6, 8))
        layers.append(nnx.Embed(VOCABULARY, width, rngs=rngs))
    for _ in range(rng.randint(1, 4)):
        name, layer, width = nnx_layer(kind, width, rng, rngs)
        layers.append(layer)
        names.append(name)
    head = nnx.Linear(width, CLASSES, rngs=rngs)
    module = Stack(layers, head, kind, rng.random() < 0.3)
    graph, parameters, rest = nnx.split(module, nnx.Param, ...)
    return names, module, lambda p, x: nnx.merge(graph, p, rest)(x), parameters


class Stack(nnx.Module):
    """Layers in turn, with residual connections where shapes allow and it is drawn; the mean over places; a head."""

    def __init__(self, layers: list, head: Any, kind: str, pooled_first: bool) -> None:
        self.layers, self.head = nnx.List(layers), head
        self.kind, self.pooled_first = kind, pooled_first

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            y = layer(x)
            x = x + y if y.shape == x.shape and jnp.issubdtype(x.dtype, jnp.floating) else y
        axes = tuple(range(1, x.ndim - 1))
        return self.head(x.mean(axes)) if self.pooled_first else self.head(x).mean(axes)


def nnx_layer(kind: str, width: int, rng: random.Random, rngs: nnx.Rngs) -> tuple[str, Any, int]:
    """(name, layer, its width) for arrays (N, ..., width)."""
    out, heads = rng.choice((4, 6, 8)), rng.choice((1, 2))
    bias = rng.random() < 0.7
    makers: dict[str, Callable] = {
        "Linear": lambda: (nnx.Linear(width, out, use_bias=bias, rngs=rngs), out),
        "activation": lambda: (rng.choice(ACTIVATIONS), width),
        "LayerNorm": lambda: (nnx.LayerNorm(width, use_bias=bias, rngs=rngs), width),
        "RMSNorm": lambda: (nnx.RMSNorm(width, rngs=rngs), width),
        "BatchNorm": lambda: (nnx.BatchNorm(width, use_running_average=True, rngs=rngs), width),
        BATCH: lambda: (nnx.BatchNorm(width, use_running_average=False, rngs=rngs), width),
        "Dropout": lambda: (nnx.Dropout(0.3, deterministic=rng.random() < 0.7, rngs=rngs), width),
        "MLP": lambda: (
            nnx.Sequential(nnx.Linear(width, out, rngs=rngs), jax.nn.gelu, nnx.Linear(out, width, rngs=rngs)),
            width,
        ),
        "Einsum": lambda: (nnx.Einsum("...i,io->...o", (width, out), (out,), rngs=rngs), out),
        "WeightNorm": lambda: (nnx.WeightNorm(nnx.Linear(width, out, rngs=rngs), rngs=rngs), out),
    }
    if kind in ("sequence", "tokens"):
        makers |= {
            "attention": lambda: (
                nnx.MultiHeadAttention(heads, width, qkv_features=4 * heads, decode=False, rngs=rngs),
                width,
            ),
            "LSTM": lambda: (nnx.RNN(nnx.OptimizedLSTMCell(width, out, rngs=rngs)), out),
            "GRU": lambda: (nnx.RNN(nnx.GRUCell(width, out, rngs=rngs)), out),
            "Conv": lambda: (nnx.Conv(width, out, (3,), use_bias=bias, rngs=rngs), out),
        }
    if kind == "image":
        strides = rng.choice((1, 2))
        makers |= {
            "Conv": lambda: (nnx.Conv(width, out, (3, 3), strides, use_bias=bias, rngs=rngs), out),
            "depthwise": lambda: (nnx.Conv(width, width, (3, 3), feature_group_count=width, rngs=rngs), width),
            "ConvTranspose": lambda: (nnx.ConvTranspose(width, out, (2, 2), strides, rngs=rngs), out),
            "GroupNorm": lambda: (nnx.GroupNorm(width, num_groups=1, rngs=rngs), width),
            "pool": lambda: (lambda x: linen.max_pool(x, (2, 2), (1, 1)), width),
        }
    name = rng.choice(sorted(makers))
    try:
        return name, *makers[name]()
    except Exception as error:
        raise NotBuilt(str(error)) from error


def linen_model(kind: str, seed: int) -> tuple[list[str], Any, Callable, Any]:
    """(names of the layers, (apply, variables), (parameters, x) -> outputs, the parameters)."""
    rng, names, layers = random.Random(seed), [], []
    if kind == "tokens":
        layers.append(linen.Embed(VOCABULARY, 6))
    for _ in range(rng.randint(1, 4)):
        name, layer = linen_layer(kind, rng)
        names.append(name)
        layers.append(layer)
    module = linen.Sequential([*layers, lambda x: x.mean(tuple(range(1, x.ndim - 1))), linen.Dense(CLASSES)])
    try:
        variables = module.init(jax.random.key(seed), inputs(kind, seed))
    except Exception as error:
        raise NotBuilt(str(error)) from error
    rest = {name: part for name, part in variables.items() if name != "params"}
    run = rng.choice((module.apply, partial(module.apply), lambda v, x: module.apply(v, x)))
    return names, (run, variables), lambda p, x: module.apply({"params": p, **rest}, x), variables["params"]


def linen_layer(kind: str, rng: random.Random) -> tuple[str, Any]:
    """(name, layer)."""
    out, bias = rng.choice((4, 6, 8)), rng.random() < 0.7
    makers: dict[str, Callable] = {
        "Dense": lambda: linen.Dense(out, use_bias=bias),
        "DenseGeneral": lambda: linen.DenseGeneral(out),
        "activation": lambda: rng.choice(ACTIVATIONS),
        "LayerNorm": lambda: linen.LayerNorm(use_bias=bias),
        "RMSNorm": linen.RMSNorm,
        "BatchNorm": lambda: linen.BatchNorm(use_running_average=True),
        "WeightNorm": lambda: linen.WeightNorm(linen.Dense(out)),
    }
    if kind in ("sequence", "tokens"):
        makers |= {
            "attention": lambda: linen.MultiHeadDotProductAttention(2, qkv_features=8, out_features=out),
            "LSTM": lambda: linen.RNN(linen.OptimizedLSTMCell(out)),
            "GRU": lambda: linen.RNN(linen.GRUCell(out)),
            "SimpleCell": lambda: linen.RNN(linen.SimpleCell(out)),
            "Conv": lambda: linen.Conv(out, (3,)),
        }
    if kind == "image":
        makers |= {
            "Conv": lambda: linen.Conv(out, (3, 3), strides=rng.choice((1, 2)), use_bias=bias),
            "ConvTranspose": lambda: linen.ConvTranspose(out, (2, 2)),
            "ConvLocal": lambda: linen.ConvLocal(out, (3, 3)),
            "GroupNorm": lambda: linen.GroupNorm(num_groups=1),
        }
    name = rng.choice(sorted(makers))
    return name, makers[name]()


def inputs(kind: str, seed: int) -> Any:
    """A batch of N samples."""
    rng = np.random.default_rng(seed)
    shapes = {"vector": (5,), "image": (SIDE, SIDE, 3), "sequence": (LENGTH, 5)}
    if kind == "tokens":
        return jnp.asarray(rng.integers(0, VOCABULARY, (SAMPLES, LENGTH)))
    return jnp.asarray(rng.normal(size=(SAMPLES, *shapes[kind])).astype("float32"))


def compared(build: Callable, kind: str, seed: int) -> tuple[str, str]:
    """Build, measure, compare."""
    names, model, function, parameters = build()
    x, y = inputs(kind, seed), jnp.arange(SAMPLES) % CLASSES

    def loss(p: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(function(p, x), y).mean()

    try:
        grads = jax.jit(jax.grad(loss))(parameters)
    except Exception as error:
        raise NotBuilt(str(error)) from error
    rate = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads))
    if not rate > 0:
        raise NotBuilt("nothing is learnt")
    said = " + ".join(names)
    try:
        d = lnp.decompose(model, (x, y), max_probes=2)
        record = evaluate(Norms(), model, ((x, y),), Options())
    except (ValueError, TypeError) as error:
        return "refused", f"{said}: {error}"[:250]
    pairs = {"rate": ([d.rate], [rate])}
    draws = any(name == "Dropout" for name in names) and "not taken apart" in " ".join(d.notes)
    if draws:
        pairs = {}  # another mask than the reference's
    if record["norms"] and BATCH not in names:  # its statistics are those of the sample, for a sample alone
        pairs |= norms_alone(function, parameters, x, record)
    if not pairs:
        raise NotBuilt("nothing to compare")
    found, notes = verdict(pairs, d.notes)
    return found, f"{said}: {notes}"


def norms_alone(function: Callable, parameters: Any, x: Any, record: dict[str, Any]) -> dict[str, tuple]:
    """{number of the parameter: (lnp's squared norms, those of each sample run by itself)}, in the order of size."""

    @jax.jit
    def alone(x: jax.Array, v: jax.Array) -> list[jax.Array]:
        grads = jax.grad(lambda p: jnp.vdot(function(p, x[None])[0], v))(parameters)
        return [jnp.sum(g**2) for g in jax.tree.leaves(grads)]

    rows = np.array([[float(value) for value in alone(x[n], record["v"][n])] for n in range(SAMPLES)])
    lnps = np.array([np.asarray(values, float) for values in record["norms"].values()]).T
    if lnps.shape != rows.shape:
        return {"number of parameters": ([lnps.shape[1]], [rows.shape[1]])}
    # names differ between the libraries: parameters are matched by what all samples say of them together
    order, other = np.argsort(lnps.sum(0), kind="stable"), np.argsort(rows.sum(0), kind="stable")
    return {f"parameter {i}": (lnps[:, a], rows[:, b]) for i, (a, b) in enumerate(zip(order, other, strict=True))}
