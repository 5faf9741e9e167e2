"""What the decomposition of a Keras model must be, from a dense Jacobian by the means of the framework under it."""

from __future__ import annotations

import keras
import numpy as np

BACKEND = keras.backend.backend()


def numpy(tensor):
    """A tensor as a float64 array."""
    return np.asarray(keras.ops.convert_to_numpy(tensor), np.float64)


def jacobian(run, model):
    """(outputs (N, K), J (N K, P)) of run(), a function of the model's trainable variables."""
    flat = lambda: keras.ops.reshape(run(), (-1,))
    shape = tuple(run().shape)
    rows = {"tensorflow": _tensorflow, "torch": _torch, "jax": _jax}[BACKEND](flat, model.trainable_variables)
    return numpy(run()).reshape(shape[0], -1), rows


def factors(run, model, loss, terms):
    """The factors of `loss`, a function of outputs in NumPy whose gradient is taken by central differences."""
    return of_jacobian(*jacobian(run, model), loss, terms)


def of_jacobian(outputs, j, loss, terms):
    """The same from outputs (N, K) and J (N K, P)."""
    g = gradient(loss, outputs)
    kernel, g = j @ j.T, g.reshape(-1)
    rate, g2, trace = g @ kernel @ g, g @ g, np.trace(kernel)
    return {
        "loss": float(loss(outputs)),
        "rate": rate,
        "chi_loss": terms * g2,
        "chi_net": trace / terms,
        "chi_pos": rate / (g2 * trace),
    }


def gradient(loss, outputs, step=1e-4):
    """By Richardson's extrapolation of central differences: exact to about 1e-11 for smooth losses of order one."""
    made = np.zeros_like(outputs)
    for index in np.ndindex(outputs.shape):
        unit = np.zeros_like(outputs)
        unit[index] = 1
        slopes = [(loss(outputs + h * unit) - loss(outputs - h * unit)) / (2 * h) for h in (20 * step, 10 * step)]
        made[index] = (4 * slopes[1] - slopes[0]) / 3
    return made


def _tensorflow(flat, variables):
    import tensorflow as tf

    with tf.GradientTape(persistent=True) as tape:
        outputs = flat()
    blocks = tape.jacobian(
        outputs, [v.value for v in variables], unconnected_gradients="zero", experimental_use_pfor=False
    )
    return np.concatenate([np.asarray(tf.convert_to_tensor(b), np.float64).reshape(len(b), -1) for b in blocks], axis=1)


def _torch(flat, variables):
    import torch

    outputs, leaves = flat(), [v.value for v in variables]
    rows = [
        torch.autograd.grad(row, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for row in outputs
    ]
    return np.array([np.concatenate([g.detach().double().numpy().ravel() for g in row]) for row in rows])


def _jax(flat, variables):
    import jax

    def function(values):
        with keras.StatelessScope(list(zip(variables, values, strict=True))):
            return flat()

    blocks = jax.jacrev(function)([v.value for v in variables])
    return np.concatenate([np.asarray(b, np.float64).reshape(b.shape[0], -1) for b in blocks], axis=1)
