"""The record that the core works on, for one batch. Safe to trace and compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lnp import batches
from lnp.backends import Options
from lnp.linearization import Linearization, coupling_tolerance
from lnp.losses import separable
from lnp_jax import batch_norm, losses, parts
from lnp_jax.models import Arrays, Structure
from lnp_jax.outputs import flatten, rebuild
from lnp_jax.outputs import parts as parts_of

COUPLED = (
    "the samples interact in this network (a sample's output or gradient changes when the others are left out; a "
    "dropout mask that is drawn for the whole batch does that too): they are not taken apart"
)


@dataclass(frozen=True)
class _Loss:
    value: jax.Array
    gradient: jax.Array
    of: Callable[[jax.Array], jax.Array]
    terms: Any
    violations: tuple
    notes: tuple[str, ...]


def record(
    structure: Structure, arrays: Arrays, batch: Any, seed: Any, options: Options, coupled: bool
) -> Linearization:
    """Linearise the model on a batch. `coupled` says that its samples are known to interact."""
    inputs, targets = batches.unpack(batch)
    notes: tuple[str, ...] = (COUPLED,) if coupled else ()
    if options.batch_statistics == "frozen":
        structure, arrays, more = batch_norm.frozen(structure, arrays, inputs)
        notes = (*notes, *more)
    shown = structure.shown
    parameters = {shown[name]: jnp.asarray(arrays[name]) for name in structure.trained}
    rest = {name: value for name, value in arrays.items() if name not in shown}

    def function(parameters: Mapping, inputs: Any) -> Any:
        return structure.call(rest | {name: parameters[known] for name, known in shown.items()}, inputs)

    run, outputs, vjp, split, tree = _passes(function, parameters, inputs, options.microbatch)
    loss = _loss(outputs, tree, targets, options)
    groups = None if options.microbatch is None else parts.Micro(function, split, options.microbatch)
    types = [leaf.dtype for leaf in (*parameters.values(), *parts_of(tree))]
    narrow = max(types, key=lambda dtype: jnp.finfo(dtype).eps)
    apart, flag, why = _apart(function, split, parameters, outputs, loss.gradient, vjp, narrow, options)
    return Linearization(
        xp=jnp,
        outputs=outputs,
        loss=loss.value,
        loss_gradient=loss.gradient,
        loss_terms=loss.terms,
        vjp=vjp,
        inner_products=lambda u, w: {name: jnp.sum(parts.wide(u[name]) * parts.wide(w[name])) for name in parameters},
        signs=_signs(seed, outputs),
        jvp=lambda u: jax.jvp(run, (parameters,), (_as(u, parameters),))[1],
        sample_square_norms=apart,
        coupled=flag,
        group_square_norms=None if groups is None else lambda v: groups.square_norms(parameters, v),
        groups=1 if groups is None else groups.groups,
        loss_along=lambda u, step: loss.of(run({n: p + (step * u[n]).astype(p.dtype) for n, p in parameters.items()})),
        separable=separable(options.loss),
        violations=loss.violations,
        notes=(*notes, *loss.notes, *why),
        while_loop=lambda going, body, state: jax.lax.while_loop(going, body, jax.tree.map(jnp.asarray, state)),
    )


def _passes(
    function: parts.Function, parameters: Mapping, inputs: Any, microbatch: int | None
) -> tuple[Callable, jax.Array, Callable, parts.Split, Any]:
    """(parameters -> (N, K), its value, vjp, the inputs' split, outputs as the model returns them)."""
    if microbatch is None:

        def whole(parameters: Mapping) -> tuple[jax.Array, Any]:
            tree = function(parameters, inputs)
            return flatten(tree), tree

        outputs, pullback, tree = jax.vjp(whole, parameters, has_aux=True)
        split = parts.Split(inputs, outputs.shape[0])
        return (lambda p: whole(p)[0]), outputs, lambda v: pullback(v)[0], split, tree
    tree = jax.eval_shape(function, parameters, inputs)
    split = parts.Split(inputs, jax.eval_shape(flatten, tree).shape[0])
    if not split.possible:
        raise ValueError(
            f"microbatch={microbatch} was asked for, but no input runs over the {split.samples} samples along its "
            "first axis. Expected at least one that does. Leave microbatch unset."
        )
    micro = parts.Micro(function, split, microbatch)
    return micro.outputs, micro.outputs(parameters), lambda v: micro.vjp(parameters, v), split, tree


def _loss(outputs: jax.Array, tree: Any, targets: Any, options: Options) -> _Loss:
    """L and dL/df."""
    targets = jax.tree.map(jnp.asarray, targets)
    if hasattr(targets, "shape"):
        batches.check_lengths(outputs.shape[0], targets.shape)
    made = rebuild(outputs, tree)
    function, terms, violations, notes = losses.prepare(options.loss, made, targets, options.loss_terms)

    def of(flat: jax.Array) -> jax.Array:
        value = jnp.asarray(function(rebuild(flat, tree), targets))
        batches.check_loss(value.shape)
        return jnp.sum(value).astype(flat.dtype)

    value, gradient = jax.value_and_grad(of)(outputs)
    return _Loss(value, gradient, of, terms, violations, notes)


def _apart(
    function: parts.Function,
    split: parts.Split,
    parameters: Mapping,
    outputs: jax.Array,
    g: jax.Array,
    vjp: Callable,
    narrow: Any,
    options: Options,
) -> tuple[Callable | None, jax.Array | None, tuple[str, ...]]:
    """(sample_square_norms, whether the samples interact after all, notes)."""
    if not options.split:
        return None, None, ()
    if not split.possible:
        return (
            None,
            None,
            (f"no input runs over the {split.samples} samples along its first axis: they are not taken apart",),
        )
    if options.microbatch == 1:  # cannot differ from single samples: pairs can
        pairs = parts.Micro(function, split, 2)
        outputs, gradient = pairs.outputs(parameters), pairs.vjp(parameters, g)
    else:
        gradient = vjp(g)
    flag = parts.coupling(function, split, parameters, outputs, g, gradient) > coupling_tolerance(jnp, narrow)
    return parts.sample_square_norms(function, split, parameters), flag, ()


def _signs(seed: Any, outputs: jax.Array) -> Callable[[Any], jax.Array]:
    key = _key(seed)
    return lambda index: jax.random.rademacher(jax.random.fold_in(key, index), outputs.shape, outputs.dtype)


def _key(seed: Any) -> jax.Array:
    seed = jnp.asarray(seed)
    if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        return seed
    return jax.random.wrap_key_data(seed) if seed.ndim else jax.random.key(seed)


def _as(u: Mapping, parameters: Mapping) -> dict[str, jax.Array]:
    return {name: u[name].astype(p.dtype) for name, p in parameters.items()}
