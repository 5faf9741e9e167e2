"""Training runs with every kind of state that JAX users keep, each made anew for a run, to be compared bit by bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

WIDTH, CLASSES, SAMPLES, STEPS = 4, 3, 6, 3


@dataclass
class Run:
    """What is trained.

    Attributes
    ----------
    apply, parameters:
        (parameters, inputs) -> outputs, and where training starts.
    loss:
        (outputs, targets) -> scalar.
    state:
        () -> what Python holds, to be compared.
    model:
        parameters -> what a tracker is given.
    batch:
        step -> (inputs, targets).
    """

    apply: Callable
    parameters: Any
    loss: Callable = lambda outputs, targets: jnp.mean((outputs - targets) ** 2)
    state: Callable[[], Any] = tuple
    model: Callable | None = None
    batch: Callable[[int], tuple] = lambda step: (
        normal(SAMPLES, WIDTH, seed=step),
        normal(SAMPLES, CLASSES, seed=9 + step),
    )

    def measured(self, parameters: Any) -> Any:
        """The model as a tracker is given it."""
        return (self.apply, parameters) if self.model is None else self.model(parameters)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def weights() -> dict[str, jax.Array]:
    return {"w": normal(WIDTH, 5, seed=1) / 2, "b": jnp.zeros(5), "v": normal(5, CLASSES, seed=2) / 2}


def dense(p: dict, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def plain() -> Run:
    return Run(dense, weights())


def one_output() -> Run:
    """Products with a vector, which compilers fuse with what is added to them."""
    p = {"w": normal(WIDTH, 5, seed=1), "v": normal(5, 1, seed=2)}
    of = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
    return Run(of, p, batch=lambda step: (normal(SAMPLES, WIDTH, seed=step), normal(SAMPLES, 1, seed=9)))


def counting() -> Run:
    """A closure that counts, inside a function that is compiled by itself."""
    calls = 0

    @jax.jit
    def inner(p, x):
        nonlocal calls
        calls += 1
        return dense(p, x)

    def apply(p, x):
        return inner(p, x)

    return Run(apply, weights(), state=lambda: calls)


class Layer:
    """A callable object with attributes, containers, and a member that it makes when it first needs it."""

    def __init__(self) -> None:
        self.calls, self.seen, self.shapes = 0, [], {"in": set()}

    def __call__(self, p, x):
        self.calls += 1
        self.seen.append(x)  # a traced array, which outlives its trace
        self.shapes["in"].add(x.shape)
        self.last = x
        if not hasattr(self, "scale"):
            self.scale = 1.0 + 0.1 * self.calls
        return self.scale * dense(p, x)

    def state(self):
        return self.calls, len(self.seen), sorted(self.shapes["in"]), self.last.shape, self.scale, sorted(vars(self))


def attributes() -> Run:
    layer = Layer()
    return Run(layer, weights(), state=layer.state)


def numpy_mask() -> Run:
    """A mask from NumPy's global state, drawn while it is traced."""

    def apply(p, x):
        return dense(p, x) * jnp.asarray(np.random.rand(CLASSES) < 0.7)  # noqa: NPY002

    return Run(apply, weights())


def python_noise() -> Run:
    own = np.random.default_rng(5)

    def apply(p, x):
        return dense(p, x) * random.random() + own.standard_normal()

    return Run(apply, weights(), state=lambda: own.bit_generator.state)


class Centred:
    """A loss with a moving centre, and a weight that it draws."""

    def __init__(self) -> None:
        self.centre, self.history = 0.0, []

    def __call__(self, outputs, targets):
        self.centre += 0.5
        self.history.append(outputs.shape)
        return jnp.mean((outputs - targets - self.centre) ** 2) * (1 + np.random.rand())  # noqa: NPY002


def loss_with_state() -> Run:
    loss = Centred()
    return Run(dense, weights(), loss, state=lambda: (loss.centre, loss.history))


def callbacks() -> Run:
    """A log that compiled code writes to."""
    log = []

    def apply(p, x):
        jax.debug.callback(lambda total: log.append(float(total)), jnp.sum(x))
        return dense(p, x)

    def state():
        jax.effects_barrier()
        return log

    return Run(apply, weights(), state=state)


def rule_of_its_own() -> Run:
    """A custom derivative whose Python code counts."""
    log = []

    @jax.custom_vjp
    def rounded(w):
        return jnp.round(4 * w) / 4

    def forward(w):
        log.append("forward")
        return rounded(w), None

    def backward(_, d):
        log.append("backward")
        return (d,)

    rounded.defvjp(forward, backward)
    return Run(lambda p, x: dense(p | {"w": rounded(p["w"])}, x), weights(), state=lambda: log)


def recurrent() -> Run:
    steps = []

    def apply(p, x):
        def step(h, now):
            steps.append(now.shape)
            return jnp.tanh(h @ p["h"] + now[:, None] * p["b"]), None

        h, _ = jax.lax.scan(step, jnp.zeros((x.shape[0], 5)), x.T)
        return h @ p["v"]

    return Run(apply, weights() | {"h": normal(5, 5, seed=3) / 3}, state=lambda: steps)


def experts() -> Run:
    """Experts with a capacity. From the second step on one is over-full, and what it drops depends on the others."""

    def apply(p, x):
        chosen = jnp.argmax(x[:, :2], 1)
        hot = jax.nn.one_hot(chosen, 2)
        place = jnp.sum((jnp.cumsum(hot, 0) - 1) * hot, 1)
        kept = jnp.where((place < 4)[:, None], jnp.einsum("ni,nio->no", x, p["all"][chosen]), 0.0)
        return jnp.tanh(kept) @ p["v"]

    def batch(step):
        x, y = normal(SAMPLES, WIDTH, seed=step), normal(SAMPLES, CLASSES, seed=9)
        balanced = jnp.where(jnp.arange(SAMPLES) % 2 == 0, 9.0, -9.0)
        return x.at[:, 0].set(9.0 if step else balanced), y

    return Run(apply, {"all": normal(2, WIDTH, 5, seed=1), "v": normal(5, CLASSES, seed=2)}, batch=batch)


def narrow() -> Run:
    p = jax.tree.map(lambda a: a.astype(jnp.bfloat16), weights())
    return Run(lambda p, x: dense(p, x.astype(jnp.bfloat16)), p)


def remade() -> Run:
    """Layers that are recomputed in the backward pass."""
    layer = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))
    return Run(
        lambda p, x: layer(layer(x, p["w"]), p["v"]), {"w": normal(WIDTH, 5, seed=1), "v": normal(5, CLASSES, seed=2)}
    )


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train=True):
        x = linen.relu(linen.BatchNorm(use_running_average=not train)(linen.Dense(5)(x)))
        return linen.Dense(CLASSES)(linen.Dropout(0.4, deterministic=not train)(x))


def linen_net() -> Run:
    module = LinenNet()
    variables = module.init(jax.random.key(0), normal(SAMPLES, WIDTH), train=False)
    rngs, statistics = {"dropout": jax.random.key(1)}, variables["batch_stats"]
    stale = []

    def apply(p, x):
        made, changed = module.apply({"params": p, "batch_stats": statistics}, x, rngs=rngs, mutable=["batch_stats"])
        stale.append(jax.tree.map(jnp.shape, changed))
        return made

    return Run(apply, variables["params"], state=lambda: stale)


class FlaxNet(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(WIDTH, 5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs)
        self.drop, self.last = nnx.Dropout(0.4, rngs=rngs), nnx.Linear(5, CLASSES, rngs=rngs)
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


def flax_net() -> Run:
    model = FlaxNet(nnx.Rngs(0))
    graph, p, rest = nnx.split(model, nnx.Param, ...)
    of = lambda p: nnx.merge(graph, p, rest, copy=True)
    held = lambda: (model.calls, jax.tree.leaves(nnx.state(model)))
    return Run(lambda p, x: of(p)(x), p, state=held, model=of)


def equinox_net() -> Run:
    model = eqx.nn.MLP(WIDTH, CLASSES, 5, 1, key=jax.random.key(0))
    p, static = eqx.partition(model, eqx.is_inexact_array)
    return Run(lambda p, x: jax.vmap(eqx.combine(p, static))(x), p)


def haiku_net() -> Run:
    calls = []

    def forward(x):
        calls.append(hk.running_init())
        x = hk.dropout(hk.next_rng_key(), 0.3, hk.Linear(5)(x))
        return hk.Linear(CLASSES)(jax.nn.relu(x))

    net = hk.transform(forward)
    p = net.init(jax.random.key(0), normal(SAMPLES, WIDTH))
    return Run(lambda p, x: net.apply(p, jax.random.key(1), x), p, state=lambda: calls)


RUNS = {
    make.__name__: make
    for make in (
        plain, one_output, counting, attributes, numpy_mask, python_noise, loss_with_state, rule_of_its_own, recurrent,
        experts, narrow, remade, linen_net, flax_net, equinox_net, haiku_net,
    )
}  # fmt: skip
