"""What the decomposition must be, from a dense Jacobian of the whole batch by `jax.jacrev`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def dense(function, parameters, loss, loss_terms: int) -> dict[str, float]:
    """The factors of `loss(function(parameters))`, where the function's outputs are (N, ...)."""
    outputs = function(parameters)
    g = jax.grad(loss)(outputs).reshape(-1)
    jacobian = jax.jacrev(lambda p: function(p).reshape(-1))(parameters)
    rows = [np.asarray(leaf, np.float64).reshape(g.size, -1) for leaf in jax.tree.leaves(jacobian)]
    j, g = np.concatenate(rows, axis=1), np.asarray(g, np.float64)
    kernel = j @ j.T
    rate, g2, trace = g @ kernel @ g, g @ g, np.trace(kernel)
    return {
        "loss": float(loss(outputs)),
        "rate": rate,
        "chi_loss": loss_terms * g2,
        "chi_net": trace / loss_terms,
        "chi_pos": rate / (g2 * trace),
    }


def cross_entropy(labels):
    """The mean over labels, as a function of the outputs."""
    index = jnp.asarray(labels)[..., None]
    return lambda outputs: -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), index, axis=-1))
