"""What the decomposition must be, from a dense Jacobian of the whole batch by `jax.jacrev`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

TOLERANCE = {jnp.float32: 1e-5, jnp.float64: 1e-10}
"""Relative, of the decomposition's numbers."""


def dense(function, parameters, loss, loss_terms: int) -> dict[str, float]:
    """The factors of `loss(function(parameters))`, where the function's outputs are (N, ...)."""
    return factors(*linearized(function, parameters, loss), loss_terms)


def linearized(function, parameters, loss):
    """(loss, its gradient (N*K,), the Jacobian's columns for each leaf of the parameters (N*K, P_l))."""

    @jax.jit  # as a whole: compiling operation by operation takes longer
    def reference(parameters):
        value, g = jax.value_and_grad(loss)(function(parameters))
        return value, g.reshape(-1), jax.jacrev(lambda p: function(p).reshape(-1))(parameters)

    value, g, jacobian = reference(parameters)
    columns = [np.asarray(leaf, np.float64).reshape(g.size, -1) for leaf in jax.tree.leaves(jacobian)]
    return float(value), np.asarray(g, np.float64), columns


def factors(value, g, columns, loss_terms: int) -> dict[str, float]:
    """The decomposition's numbers from these."""
    j = np.concatenate(columns, axis=1)
    kernel = j @ j.T
    rate, g2, trace = g @ kernel @ g, g @ g, np.trace(kernel)
    return {
        "loss": value,
        "rate": rate,
        "chi_loss": loss_terms * g2,
        "chi_net": trace / loss_terms,
        "chi_pos": rate / (g2 * trace),
    }


def agrees(d, expected: dict[str, float], dtype=jnp.float64) -> None:
    """The decomposition's numbers are the expected ones, relative to their size."""
    assert {name: getattr(d, name) for name in expected} == pytest.approx(expected, rel=TOLERANCE[dtype])


def cross_entropy(labels):
    """The mean over labels, as a function of the outputs."""
    index = jnp.asarray(labels)[..., None]
    return lambda outputs: -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), index, axis=-1))


def cast(tree, dtype):
    """The floating-point leaves in another type."""
    floating = lambda leaf: hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if floating(leaf) else leaf, tree)
