"""A training step's loss and gradient, with the decomposition for the price of its probes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import lnp
from lnp.backends import Options
from lnp_jax.apart import Verdict
from lnp_jax.compiled import OBSERVER, Observer
from lnp_jax.judge import judged, traced
from lnp_jax.models import Structure, separate
from lnp_jax.record import loss_and_gradient

OPTIONS = ("by_layer", "population", "estimator", "rtol", "max_probes", "loss_terms")


def value_and_grad(apply: Callable, loss: str | Callable | None = None, **options: Any) -> Callable:
    """(parameters, batch, key) -> ((loss, decomposition), gradients): `jax.value_and_grad` of the batch's loss, and
    `lnp.decompose` with the same forward and backward pass.

    Pure, for use inside `jax.jit`. The gradients have the structure of `parameters` and are those of
    `jax.value_and_grad`, to rounding. Called outside of `jax.jit`, the batch is looked at once for each shape, as in
    `lnp.decompose`, and what was found holds in whatever is traced from then on. Where nothing was looked at, two
    samples are compared inside each time, which costs about three samples' passes: where a sample's output depends on
    others, loss and gradients come from a pass of the batch, and the decomposition's numbers are nan.

    Parameters
    ----------
    apply:
        `apply(parameters, inputs) -> outputs`. For an Equinox module `lambda p, x: jax.vmap(eqx.combine(p, static))(x)`
        with `p, static = eqx.partition(model, eqx.is_inexact_array)`; for an NNX module
        `lambda p, x: nnx.merge(graph, p, rest, copy=True)(x)` with `graph, p, rest = nnx.split(model, nnx.Param, ...)`.
    loss:
        As for `lnp.decompose`.
    options:
        `by_layer`, `population`, `estimator`, `rtol`, `max_probes` and `loss_terms` of `lnp.decompose`.

    Raises
    ------
    TypeError
        For other options.
    ValueError
        If leaves of `parameters` cannot be trained.

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
    shared = partial(jax.jit, static_argnums=3)(partial(_shared, apply, loss, options))

    def value_and_grad_of(parameters: Any, batch: Any, key: Any) -> tuple[tuple[jax.Array, lnp.Decomposition], Any]:
        structure, arrays = separate((apply, parameters), None, None)
        if set(structure.trained) != set(structure.names) or structure.fixed:
            other = [name for name in structure.names if name not in structure.trained]
            raise ValueError(
                f"The parameters hold leaves that are not trained: {other[:4] or 'no arrays'}. Expected "
                "floating-point arrays only. Close over the others in apply."
            )
        if traced((arrays, batch, key)):
            return _shared(apply, loss, options, parameters, batch, key, None)
        return shared(parameters, batch, key, judged(structure, arrays, batch, Options()))

    return value_and_grad_of


def _shared(
    apply: Callable, loss: Any, options: dict[str, Any], parameters: Any, batch: Any, key: Any, verdict: Verdict | None
) -> tuple:
    seen = Observer(verdict)
    token = OBSERVER.set(seen)
    try:
        d = lnp.decompose((apply, parameters), batch, loss, seed=key, **options)
    finally:
        OBSERVER.reset(token)
    (lin,) = seen.records
    made = lin.loss, lin.vjp(lin.loss_gradient)
    structure, arrays = separate((apply, parameters), None, None)
    if lin.coupled is not None:
        true = lambda: loss_and_gradient(structure, arrays, batch, Options(loss, loss_terms=options.get("loss_terms")))
        made = jax.lax.cond(lin.coupled, true, lambda: made)
    return (made[0], d), _tree(structure, made[1])


def _tree(structure: Structure, vector: Any) -> Any:
    """A vector in parameter space in the structure of the parameters."""
    return jax.tree.unflatten(structure.treedef, [jnp.asarray(vector[structure.shown[n]]) for n in structure.names])
