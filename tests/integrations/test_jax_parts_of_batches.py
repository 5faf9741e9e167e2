"""Nested batches, Gram matrices and two losses in JAX: containers of arrays, and what is asked for inside of jit."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

import lnp


class Graphs(NamedTuple):
    """Graphs one after the other: `sizes` runs over them, the nodes do not."""

    nodes: jax.Array
    sizes: jax.Array


KEYS = jax.random.split(jax.random.key(0), 3)
WEIGHT = jax.random.normal(KEYS[0], (3, 2))
BATCH = jax.random.normal(KEYS[1], (6, 3)), jax.random.normal(KEYS[2], (6, 2))


def apply(weight, x):
    return jnp.tanh(x @ weight)


MODEL = apply, WEIGHT


def test_a_graph_is_refused_before_anything_runs():
    def pooled(weight, graphs):
        raise AssertionError("the model ran")

    graphs = Graphs(jnp.ones((9, 3)), jnp.asarray([2, 3, 4]))
    with pytest.raises(ValueError, match=r"its inputs hold arrays of shapes \[\(9, 3\), \(3,\)\]"):
        lnp.decompose_nested((pooled, WEIGHT), (graphs, jnp.ones((3, 2))), batch_sizes=(2, 3))


def test_nested_batches_inside_of_jit_are_those_outside():
    def positions(weight):
        nested = lnp.decompose_nested((apply, weight), BATCH, "mse", batch_sizes=(3, 6))
        return [d.chi_pos for d in nested.decompositions]

    outside = lnp.decompose_nested(MODEL, BATCH, "mse", batch_sizes=(3, 6))
    assert jax.jit(positions)(WEIGHT) == pytest.approx([d.chi_pos for d in outside.decompositions], rel=1e-5)


@pytest.mark.parametrize(
    "measure",
    [
        lambda weight: lnp.gradient_gram((apply, weight), [BATCH, BATCH], "mse").matrix,
        lambda weight: lnp.cross_response((apply, weight), BATCH, BATCH, "mse", measured_loss="huber").rate,
    ],
)
def test_gradients_are_not_held_inside_of_jit(measure):
    with pytest.raises(TypeError, match=r"inside of a compiled function\. Expected a call outside of one"):
        jax.jit(measure)(WEIGHT)
