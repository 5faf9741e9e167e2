"""What a measurement costs in JAX, beside a training step's gradient and beside other ways to the same number.

    python benchmarks/jax_benchmark.py [--quick] [--only cost,growth,error] [--models mlp,cnn,lm]

All cases of a model run in turn in one process; times are medians of ratios to the gradient in the same round. Memory is
what XLA says that the compiled programs need beside their arguments and results. Peers that cannot be installed or
imported are named in the notes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Problem:
    """A network, its parameters, a batch, and the loss terms that lnp would count."""

    apply: Callable
    parameters: dict[str, Any]
    batch: tuple[jax.Array, jax.Array]

    @property
    def outputs(self) -> int:
        """K."""
        out = jax.eval_shape(self.apply, self.parameters, self.batch[0])
        return out.size // out.shape[0]


def drawn(seed: int = 0) -> Callable[..., jax.Array]:
    """A maker of normal arrays of a given scale."""
    generator = np.random.default_rng(seed)
    return lambda scale, *shape: jnp.asarray(scale * generator.standard_normal(shape), jnp.float32)


def mlp(samples: int = 128, width: int = 512, outputs: int = 10) -> Problem:
    """784 - width - width - outputs, ReLU."""
    normal, sizes = drawn(), (784, width, width, outputs)
    parameters = {}
    for i, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        parameters |= {f"w{i}": normal(rows**-0.5, rows, columns), f"b{i}": normal(0.1, columns)}
    return Problem(_mlp, parameters, (normal(1, samples, 784), jnp.arange(samples) % outputs))


def _mlp(p: dict, x: jax.Array) -> jax.Array:
    for i in range(2):
        x = jax.nn.relu(x @ p[f"w{i}"] + p[f"b{i}"])
    return x @ p["w2"] + p["b2"]


def cnn(samples: int = 64, width: int = 32, outputs: int = 10) -> Problem:
    """Three 3x3 convolutions with width, 2 width and 4 width channels on 32x32 images, each pooled by two."""
    normal, channels = drawn(), (3, width, 2 * width, 4 * width)
    features = 16 * channels[-1]
    parameters = {"head": normal(features**-0.5, features, outputs), "bias": normal(0.1, outputs)}
    for i, (rows, columns) in enumerate(itertools.pairwise(channels)):
        parameters |= {f"k{i}": normal((9 * rows) ** -0.5, 3, 3, rows, columns), f"b{i}": normal(0.1, columns)}
    return Problem(_cnn, parameters, (normal(1, samples, 32, 32, 3), jnp.arange(samples) % outputs))


def _cnn(p: dict, x: jax.Array) -> jax.Array:
    for i in range(3):
        x = jax.lax.conv_general_dilated(x, p[f"k{i}"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + p[f"b{i}"])
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.reshape(x.shape[0], -1) @ p["head"] + p["bias"]


def lm(samples: int = 16, width: int = 256, layers: int = 4, vocabulary: int = 2000, length: int = 64) -> Problem:
    """A causal transformer with pre-normalisation, four heads, and a head of its own."""
    normal, d = drawn(), width
    parameters = {"embedding": normal(1, vocabulary, d), "position": normal(0.3, length, d)}
    parameters |= {"head": normal(d**-0.5, d, vocabulary), "scale": jnp.ones(d)}
    for i in range(layers):
        parameters |= {
            f"qkv{i}": normal(d**-0.5, d, 3 * d), f"out{i}": normal(0.5 * d**-0.5, d, d), f"up{i}": normal(d**-0.5, d, 4 * d),
            f"down{i}": normal(0.5 * (4 * d) ** -0.5, 4 * d, d), f"s{i}": jnp.ones(d), f"t{i}": jnp.ones(d),
        }  # fmt: skip
    tokens = np.random.default_rng(1).integers(0, vocabulary, (samples, length + 1))
    return Problem(
        functools.partial(_lm, layers), parameters, (jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]))
    )


def _lm(layers: int, p: dict, tokens: jax.Array) -> jax.Array:
    x = p["embedding"][tokens] + p["position"]
    for i in range(layers):
        x = x + _attention(_normalised(x) * p[f"s{i}"], p[f"qkv{i}"]) @ p[f"out{i}"]
        x = x + jax.nn.gelu(_normalised(x) * p[f"t{i}"] @ p[f"up{i}"]) @ p[f"down{i}"]
    return _normalised(x) * p["scale"] @ p["head"]


def _normalised(x: jax.Array) -> jax.Array:
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def _attention(x: jax.Array, weight: jax.Array, heads: int = 4) -> jax.Array:
    n, s, d = x.shape
    q, k, v = jnp.moveaxis((x @ weight).reshape(n, s, 3, heads, d // heads), 2, 0)
    scores = jnp.einsum("nshe,nthe->nhst", q, k) * (d // heads) ** -0.5
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((s, s), bool)), scores, -jnp.inf))
    return jnp.einsum("nhst,nthe->nshe", weights, v).reshape(n, s, d)
