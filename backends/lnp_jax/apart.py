"""Whether samples can be taken apart, and whether taps tell the truth: compared with single samples on their own.

Once for each model and shape, on the real batch. Inside the user's compiled functions, where nothing can be read and
remembered, a pair of samples is compared each time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lnp_jax import fallback
from lnp_jax.bound_model import Network
from lnp_jax.outputs import flatten
from lnp_jax.taps.backward_pass import Tapped, tapped

INTERACT = "the samples interact in this network ({}): they are not taken apart"
CHECKED = 8
"""Samples that are compared, spread over the batch."""
SHARE = 0.03
"""A parameter whose gradient is rounding noise beside the others' (a key's bias) is compared with this share of all."""


@dataclass(frozen=True)
class Verdict:
    """What the comparison has shown.

    Attributes
    ----------
    reason:
        Why the samples are not taken apart, or "".
    excluded:
        Parameters whose taps differ from single samples.
    """

    reason: str = ""
    excluded: frozenset[str] = frozenset()


@partial(jax.tree_util.register_dataclass, data_fields=["coupling", "outputs", "taps", "tolerance"], meta_fields=[])
@dataclass(frozen=True)
class Differences:
    """Relative differences; nan where numbers are not finite.

    Attributes
    ----------
    coupling:
        Of single samples from the batch, in outputs and in J^T v, shape ().
    outputs:
        Of the outputs of the tapped network from the batch's, shape ().
    taps:
        {name: of J^T v and the squared norms by taps}, each of shape ().
    tolerance:
        Up to which they are rounding.
    """

    coupling: jax.Array
    outputs: jax.Array
    taps: Mapping[str, jax.Array]
    tolerance: float

    def verdict(self) -> Verdict:
        """What follows from them, once they can be read."""
        if self.coupling > self.tolerance:
            return Verdict(
                INTERACT.format(
                    f"a sample's output or gradient changes by {float(self.coupling):.1g} (relative) when the others "
                    "are left out; a dropout mask that is drawn for the whole batch does that too"
                )
            )
        wrong = self.outputs > self.tolerance
        return Verdict("", frozenset(name for name, value in self.taps.items() if wrong or value > 2 * self.tolerance))

    @property
    def finite(self) -> bool:
        """Whether they say anything."""
        return all(np.isfinite(value) for value in (self.coupling, self.outputs, *self.taps.values()))


def impossible(net: Network) -> str:
    """Why single samples cannot even be run, or ""."""
    samples = net.split.samples
    if not net.split.possible:
        return f"no input runs over the {samples} samples along its first axis: they are not taken apart"
    of_one = fallback.single(net.function, net.split)
    of_few = lambda p, rows: flatten(net.function(p, net.split.inputs(rows)))
    numbers = jax.eval_shape(flatten, net.tree).shape
    try:
        shapes = [jax.eval_shape(jax.vmap(of_one, (None, 0)), dict(net.parameters), net.split.rows).shape]
        for few in (1, min(2, samples)):
            made = jax.eval_shape(of_few, dict(net.parameters), [row[:few] for row in net.split.rows]).shape
            shapes.append((made[0] - few + samples, *made[1:]))
    except (TypeError, ValueError, IndexError, NotImplementedError, ZeroDivisionError) as error:
        line = (str(error).splitlines() or [""])[0][:120]
        return INTERACT.format(f"one or two samples alone fail with {type(error).__name__}: {line}")
    other = [shape for shape in shapes if shape != numbers]
    return INTERACT.format(f"one or two samples alone have outputs of another shape, {other[0][1:]}") if other else ""


def compared(net: Network, size: int | None) -> Differences:
    """Differences on the batch; with `size`, on as many of its samples, as a batch of their own.

    The cotangent is zero on all samples but those that are compared: what other samples contribute shows.
    """
    function, split, parameters = net.function, net.split, net.parameters
    rows = split.rows if size is None else [row[:size] for row in split.rows]
    samples = rows[0].shape[0]
    outputs, pullback = jax.vjp(lambda p: flatten(function(p, split.inputs(rows))), dict(parameters))
    index = np.unique(np.linspace(0, samples - 1, min(CHECKED, max(samples // 2, 1))).round().astype(int))
    signs = _signs((len(index), outputs.shape[1]), outputs.dtype)
    v = jnp.zeros_like(outputs).at[index].set(signs)
    (gradient,) = pullback(v)
    network = tapped(function, split, parameters, samples)
    made, pull = network.forward(rows)
    pulled = pull(v)
    by_taps, norms = pulled.gradient, pulled.norms or {}
    alone = _alone(network, [row[index] for row in rows], signs)
    return Differences(
        jnp.maximum(apart(alone.outputs, outputs[index]), _largest(_relative(alone.gradient, gradient))),
        apart(made, outputs),
        jax.tree.map(jnp.maximum, _relative(by_taps, gradient), _norm_differences(norms, alone.norms, index)),
        net.tolerance(network.program),
    )


def pair(net: Network, network: Tapped, outputs: jax.Array) -> jax.Array:
    """Whether two samples of the batch interact, or the taps of one are wrong, shape (). The cost is three samples'."""
    split, tolerance = net.split, net.tolerance(network.program)
    index = np.asarray([0, split.samples // 2][: split.samples])
    rows = [row[index] for row in split.rows]
    both, pullback = jax.vjp(lambda p: flatten(net.function(p, split.inputs(rows))), dict(net.parameters))
    if both.shape != (len(index), outputs.shape[1]):
        return jnp.asarray(True)
    v = _signs(both.shape, both.dtype).at[1].set(0)
    (gradient,) = pullback(v)
    _, pull = network.forward([row[:1] for row in rows])
    pulled = pull(v[:1])
    by_taps, norms = pulled.gradient, pulled.norms or {}
    own = {name: jnp.sum(fallback.wide(u) ** 2)[None] for name, u in by_taps.items()}
    found = jnp.maximum(apart(outputs[index], both), _largest(_relative(by_taps, gradient)))
    return (found > tolerance) | (_largest(_norm_differences(norms, own, np.asarray([0]))) > 2 * tolerance)


@partial(jax.tree_util.register_dataclass, data_fields=["outputs", "gradient", "norms"], meta_fields=[])
@dataclass(frozen=True)
class _Alone:
    outputs: jax.Array
    gradient: Mapping[str, jax.Array]
    norms: Mapping[str, jax.Array]


def _alone(network: Tapped, rows: list, v: jax.Array) -> _Alone:
    """Single samples one after the other, with one gradient in memory at a time."""
    of_one = fallback.single(network.function, network.split)

    def step(total: Mapping, now: tuple) -> tuple:
        rows, v = now
        outputs, pullback = jax.vjp(lambda p: of_one(p, rows), dict(network.parameters))
        (gradient,) = pullback(v)
        squares = {name: jnp.sum(fallback.wide(u) ** 2) for name, u in gradient.items()}
        return jax.tree.map(jnp.add, total, gradient), (outputs, squares)

    zeros = {name: jnp.zeros_like(p) for name, p in network.parameters.items()}
    total, (outputs, squares) = jax.lax.scan(step, zeros, (rows, v))
    return _Alone(outputs, total, squares)


def irregular(shape: tuple[int, ...], number: int = 0) -> jax.Array:
    """Numbers in [-1, 1] without a pattern that a network could share; drawing random ones takes long to compile."""
    count = jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)
    return jnp.sin(78.233 * (count + 1) + 12.9898 * (count % 97) * (number + 1))


def _signs(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.where(irregular(shape) < 0, -1, 1).astype(dtype)


def apart(one: jax.Array, other: jax.Array) -> jax.Array:
    """The largest difference, relative to the largest number of the other. Shape ()."""
    return jnp.max(jnp.abs(one - other)) / _positive(jnp.max(jnp.abs(other)))


def _relative(one: Mapping, other: Mapping) -> dict[str, jax.Array]:
    """{name: ||a - b|| / ||b||}, where all of b counts a little."""
    size = lambda array: jnp.linalg.norm(fallback.wide(array).ravel())
    norms = {name: size(array) for name, array in other.items()}
    floor = SHARE * jnp.linalg.norm(jnp.stack(list(norms.values())))
    return {
        name: size(fallback.wide(one[name]) - fallback.wide(other[name])) / _positive(norms[name] + floor)
        for name in norms
    }


def _norm_differences(norms: Mapping, expected: Mapping, index: Any) -> dict[str, jax.Array]:
    """For each name, how far squared norms are off, and what arrives on samples whose cotangent is zero."""
    total = sum(expected.values())
    found = {}
    for name in expected:
        missed = jnp.abs(norms[name][index] - expected[name]) / _positive(expected[name] + SHARE**2 * total)
        leaked = jnp.max(norms[name].at[index].set(0)) / _positive(jnp.max(total))
        found[name] = jnp.maximum(jnp.max(missed), leaked)
    return found


def _largest(values: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.max(jnp.stack(list(values.values())))


def _positive(value: jax.Array) -> jax.Array:
    return jnp.maximum(value, jnp.finfo(value.dtype).tiny)
