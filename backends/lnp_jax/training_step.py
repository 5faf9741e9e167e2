"""A training step's loss and gradient as they are without lnp, and the decomposition beside them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

import lnp
from lnp.arguments import Loss
from lnp.contract import validation
from lnp.parameter_texts import parameters_of
from lnp_jax.losses import step_value
from lnp_jax.model import separate
from lnp_jax.observed import without_states
from lnp_jax.self_check import traced
from lnp_jax.state_guard import leave_no_trace

OPTIONS = ("by_layer", "population", "estimator", "rtol", "max_probes", "loss_terms")


@parameters_of(lnp.decompose)
def value_and_grad(apply: Callable, loss: Loss = None, **options: Any) -> Callable:
    """(parameters, batch, key) -> ((loss, decomposition), gradients): `jax.value_and_grad` of the batch's loss, and
    `lnp.decompose` beside it.

    Pure, for use inside `jax.jit`. Loss and gradients come from the program of
    `jax.value_and_grad(lambda p: loss(apply(p, inputs), targets))`, which shares no operation with the measurement.
    Outside of `jax.jit` that program is compiled by itself, and they are the same bit by bit. Inside they are as far as
    XLA compiles a program the same beside another one: it did in every run that was tried with its default settings on
    a CPU (`docs/design.md`), and promises nothing.

    The measurement is that of `lnp.decompose`. Inside of `jax.jit` nothing can be repeated: where a sample's output
    turns out to depend on others, the decomposition's numbers are nan. Outside they are then measured jointly, with a
    note. A call outside looks at the batch once for each shape, and what it finds holds in whatever is traced from then
    on; without one, two samples are compared inside each time.

    Parameters
    ----------
    apply:
        `apply(parameters, inputs) -> outputs`. For an Equinox module `lambda p, x: jax.vmap(eqx.combine(p, static))(x)`
        with `p, static = eqx.partition(model, eqx.is_inexact_array)`; for an NNX module
        `lambda p, x: nnx.merge(graph, p, rest, copy=True)(x)` with `graph, p, rest = nnx.split(model, nnx.Param, ...)`.
    loss:
        As for `lnp.decompose`.
    by_layer, population, estimator, rtol, max_probes, loss_terms:
        As for `lnp.decompose`.

    Raises
    ------
    TypeError
        For other options.
    ValueError
        If leaves of `parameters` cannot be trained, or a batch or loss cannot be used, before the step has run.

    Examples
    --------
    One step of a training loop that measures now and then:

    >>> import jax, jax.numpy as jnp
    >>> def apply(w, x):
    ...     return x @ w
    >>> measured = value_and_grad(apply)
    >>> plain = jax.value_and_grad(lambda w, batch: jnp.mean((apply(w, batch[0]) - batch[1]) ** 2))
    >>> def with_position(w, batch, key):
    ...     (loss, d), gradient = measured(w, batch, key)
    ...     return loss, gradient, d.chi_pos
    >>> def without(w, batch, key):
    ...     return *plain(w, batch), jnp.nan
    >>> @jax.jit
    ... def step(w, batch, count):
    ...     key = jax.random.fold_in(jax.random.key(0), count)
    ...     loss, gradient, chi_pos = jax.lax.cond(count % 10 == 0, with_position, without, w, batch, key)
    ...     return w - 0.1 * gradient, loss, chi_pos
    >>> w, loss, chi_pos = step(jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1))), 0)
    >>> float(loss), float(chi_pos)
    (1.0, 0.5)
    """
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        raise TypeError(f"value_and_grad received the options {unknown}. Expected some of {', '.join(OPTIONS)}.")
    step = partial(_step, apply, loss)
    compiled = jax.jit(step)

    def value_and_grad_of(parameters: Any, batch: Any, key: Any) -> tuple[tuple[jax.Array, lnp.Decomposition], Any]:
        _check_trained(apply, parameters, batch)
        d = lnp.decompose((apply, parameters), batch, loss, seed=key, **options)  # first: it may refuse
        value, gradients = (step if traced((parameters, batch, key)) else compiled)(parameters, batch)
        return (value, d), gradients

    return value_and_grad_of


def _step(apply: Callable, loss: Loss, parameters: Any, batch: Any) -> tuple[jax.Array, Any]:
    """The step as it is without lnp: the user's function on the whole batch, the user's loss, nothing else."""
    inputs, targets = validation.unpack(batch)
    return jax.value_and_grad(lambda p: step_value(loss, apply(p, inputs), targets))(parameters)


def _check_trained(apply: Callable, parameters: Any, batch: Any) -> None:
    """Raise ValueError unless all leaves of the parameters can be trained, as `jax.grad` demands."""
    model = apply, parameters
    with leave_no_trace(model):
        structure, arrays = separate(model, None, None)
        structure = without_states(structure, arrays, validation.unpack(batch)[0])
    if set(structure.trained) != set(structure.names) or structure.fixed:
        other = [name for name in structure.names if name not in structure.trained]
        raise ValueError(
            f"The parameters hold leaves that are not trained: {other[:4] or 'no arrays'}. Expected "
            "floating-point arrays only. Close over the others in apply."
        )
