"""What a measurement costs on small networks of JAX's libraries.

    pip install '.[jax]' flax optax
    python benchmarks/architectures_jax.py [NAME ...] [--rounds 9]

For each network, with default settings:

    default       time of `lnp.decompose`, median of ratios to a training step's gradient in the same round, both
                  compiled; signs are drawn anew in each round
    first         the first call, as a multiple of the time that the step's own gradient takes to be traced and compiled
    probes, error how many probes, and the relative standard error of the network scale
    general       parameters that take the general way; "jointly" where samples are not taken apart

Without names all are measured, and benchmarks/results/architectures_jax.md is written.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from report import interleaved, machine, ratios, table, write

import lnp


@dataclass(frozen=True)
class Problem:
    """A function of its parameters, and a batch with class labels."""

    apply: Callable
    parameters: Any
    batch: tuple


def normal(*shape: int) -> jax.Array:
    """Random inputs."""
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    channels: int
    training: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv, norm = partial(nn.Conv, self.channels, use_bias=False), partial(nn.BatchNorm, not self.training)
        h = nn.relu(norm()(conv((3, 3))(x)))
        h = norm()(conv((3, 3))(h))
        return nn.relu(h + (x if x.shape == h.shape else norm()(conv((1, 1))(x))))


class ResNet(nn.Module):
    """Six convolutions in three blocks, for images of 16 x 16."""

    training: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for channels in (16, 32, 64):
            x = nn.avg_pool(Block(channels, self.training)(x), (2, 2), (2, 2))
        return nn.Dense(10)(x.mean((1, 2)))


def resnet(training: bool) -> Problem:
    """Linen's ResNet, with its batch statistics beside the parameters."""
    x, model = normal(16, 16, 16, 3), ResNet(training)
    variables = model.init(jax.random.key(0), x)

    def apply(p: Any, x: jax.Array) -> jax.Array:
        held = {"params": p, "batch_stats": variables["batch_stats"]}
        return model.apply(held, x, mutable=["batch_stats"])[0] if training else model.apply(held, x)

    return Problem(apply, variables["params"], (x, jnp.arange(16) % 10))


class Layer(nnx.Module):
    """A layer of a transformer."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.first, self.second = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, rngs=rngs, decode=False)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.first(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.second(x))))


class Transformer(nnx.Module):
    """A language model, whose layers run one by one or by a scan."""

    def __init__(self, width: int, symbols: int, layers: int, scanned: bool) -> None:
        rngs = nnx.Rngs(0)
        self.embedding, self.place = nnx.Embed(symbols, width, rngs=rngs), nnx.Embed(64, width, rngs=rngs)
        made = [Layer(width, rngs) for _ in range(layers)]
        self.graph = nnx.graphdef(made[0])
        states = [nnx.state(layer) for layer in made]
        self.layers = nnx.data(jax.tree.map(lambda *parts: jnp.stack(parts), *states) if scanned else states)
        self.scanned, self.norm = scanned, nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embedding(ids) + self.place(jnp.arange(ids.shape[1]))
        if self.scanned:
            x, _ = jax.lax.scan(lambda x, state: (nnx.merge(self.graph, state)(x), None), x, self.layers)
        else:
            for state in self.layers:
                x = nnx.merge(self.graph, state)(x)
        return self.embedding.attend(self.norm(x))


def transformer(scanned: bool) -> Problem:
    """8 sequences of 32 symbols."""
    graph, parameters = nnx.split(Transformer(64, 500, 4, scanned))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 500, (8, 33)))
    return Problem(lambda p, ids: nnx.merge(graph, p, copy=True)(ids), parameters, (ids[:, :-1], ids[:, 1:]))


def graphs() -> Problem:
    """32 graphs of 12 nodes and 24 edges, padded to the same size as jraph does: messages are added up at nodes."""
    generator = np.random.default_rng(0)
    edges = jnp.asarray(generator.integers(0, 12, (32, 24, 2)))
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"in": (8, 32), "message0": (64, 32), "message1": (64, 32), "update": (64, 32), "out": (32, 4)}
    items = zip(keys, shapes.items(), strict=True)
    parameters = {name: jax.random.normal(key, shape) / shape[0] ** 0.5 for key, (name, shape) in items}

    def one(p: dict, nodes: jax.Array, edges: jax.Array) -> jax.Array:
        h = jnp.tanh(nodes @ p["in"])
        for step in range(2):
            ends = jnp.concatenate([h[edges[:, 0]], h[edges[:, 1]]], axis=1)
            arrived = jax.ops.segment_sum(jax.nn.relu(ends @ p[f"message{step}"]), edges[:, 1], 12)
            h = h + jnp.tanh(jnp.concatenate([h, arrived], axis=1) @ p["update"])
        return h.mean(0) @ p["out"]

    def apply(p: dict, inputs: tuple) -> jax.Array:
        return jax.vmap(one, (None, 0, 0))(p, *inputs)

    return Problem(apply, parameters, ((normal(32, 12, 8), edges), jnp.arange(32) % 4))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "Linen ResNet, batch norm in training": partial(resnet, True),
    "Linen ResNet, batch norm evaluated": partial(resnet, False),
    "GPT": partial(transformer, False),
    "NNX transformer by scan": partial(transformer, True),
    "graph network": graphs,
}


def measured(name: str, rounds: int) -> dict[str, Any]:
    """A row of the table."""
    problem = PROBLEMS[name]()
    inputs, labels = problem.batch

    def loss(p: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(problem.apply(p, inputs), labels).mean()

    before = time.perf_counter()
    step = jax.jit(jax.value_and_grad(loss)).lower(problem.parameters).compile()
    compiling = time.perf_counter() - before
    model, found = (problem.apply, problem.parameters), []
    before = time.perf_counter()
    lnp.decompose(model, problem.batch)
    first = time.perf_counter() - before
    seconds = interleaved(
        {
            "step": lambda: jax.block_until_ready(step(problem.parameters)),
            "lnp": lambda: found.append(lnp.decompose(model, problem.batch, seed=len(found))),
        },
        rounds,
    )
    notes = " ".join(found[-1].notes)
    return {
        "network": name,
        "step, ms": 1000 * statistics.median(seconds["step"]),
        "default": ratios(seconds, "step")["lnp"],
        "step's compilation, s": compiling,
        "first": first / compiling,
        "probes": statistics.median(d.probes for d in found),
        "error": statistics.median(d.chi_net_stderr / d.chi_net for d in found),
        "general": "jointly" if "not taken apart" in notes else str(notes.count("run on their own") or ""),
    }


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(PROBLEMS)}")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    rows = []
    for name in given.names or PROBLEMS:
        rows.append(measured(name, given.rounds))
        print(table(rows[-1:]), flush=True)
        jax.clear_caches()
    if not given.names:
        tables = {"Time in steps, the first call in compilations of the step": rows}
        print(*write("architectures_jax", {"title": "Small networks in JAX", "machine": machine(), "tables": tables}))


if __name__ == "__main__":
    main()
