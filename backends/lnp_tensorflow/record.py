"""The record that the core works on, for one batch. Safe to trace into a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from lnp import batches
from lnp.backends import Options
from lnp.linearization import Linearization, coupling_tolerance, while_loop
from lnp.losses import separable
from lnp_tensorflow import losses, namespace
from lnp_tensorflow.forward import Forward, draws_since, moved, operations
from lnp_tensorflow.outputs import flatten, parts, rebuild, split, wide
from lnp_tensorflow.samples import Groups, difference, gradients

COUPLED = (
    "the samples interact in this network (a sample's output or gradient changes when the others are left out; "
    "dropout and batch normalisation in training mode do that too): they are not taken apart"
)


@dataclass(frozen=True)
class _Loss:
    value: tf.Tensor
    gradient: tf.Tensor
    of: Callable[[list[tf.Tensor]], tf.Tensor]
    terms: Any
    violations: tuple
    notes: tuple[str, ...]


def record(run: Forward, inputs: Any, targets: Any, seed: Any, options: Options, coupled: bool) -> Linearization:
    """Linearise the model on a batch. `coupled` says that its samples are known to interact."""
    sources, before = run.sources, operations()
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(list(sources.values()))
        returned = run(inputs)
    drawn, outputs = draws_since(before), parts(returned)
    flat = flatten(outputs)
    groups = _groups(Groups(run, inputs, tuple(flat.shape), flat.dtype, options.microbatch or 1), options)
    if groups is not None:
        flat = groups.outputs()  # in a graph, the pass over the whole batch is not run if nothing else needs it
    loss = _loss(flat, outputs, returned, targets, options)

    def vjp(v: tf.Tensor) -> list[tf.Tensor]:
        pulled = gradients(tape, outputs, sources, v) if groups is None else groups.vjp(v)
        return [tf.convert_to_tensor(pulled[name]) for name in sources]

    apart, flag, why = _apart(run, inputs, flat, loss.gradient, vjp, options)
    return Linearization(
        xp=namespace,
        outputs=flat,
        loss=loss.value,
        loss_gradient=loss.gradient,
        loss_terms=loss.terms,
        vjp=vjp,
        inner_products=lambda u, w: {name: _dot(a, b) for name, a, b in zip(sources, u, w, strict=True)},
        signs=lambda index: _signs(seed, index, flat),
        jvp=lambda u: _jvp(tape, outputs, sources, u),
        sample_square_norms=apart,
        coupled=flag,
        group_square_norms=None if groups is None else groups.square_norms,
        groups=1 if groups is None else groups.count,
        loss_along=lambda u, step: _loss_along(run, inputs, drawn, loss, u, step),
        separable=separable(options.loss),
        violations=loss.violations,
        notes=(*((COUPLED,) if coupled else ()), *loss.notes, *why),
        while_loop=_while_loop,
    )


def _loss(flat: tf.Tensor, outputs: list, returned: Any, targets: Any, options: Options) -> _Loss:
    """L and dL/df, in float32 or better."""
    if tf.is_tensor(targets):
        batches.check_lengths(flat.shape[0], tuple(targets.shape))
    made = [tf.cast(part, wide([part])) for part in split(flat, outputs)]
    function, terms, violations, notes = losses.prepare(
        options.loss, rebuild(returned, made), targets, options.loss_terms
    )

    def of(outputs: list[tf.Tensor]) -> tf.Tensor:
        value = tf.convert_to_tensor(function(rebuild(returned, outputs), targets))
        batches.check_loss(tuple(value.shape))
        return tf.cast(tf.reshape(value, ()), flat.dtype)

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(made)
        value = of(made)
    grads = tape.gradient(value, made)
    if all(grad is None for grad in grads):
        raise ValueError(
            "The loss does not depend on the outputs. Expected loss(outputs, targets) to be differentiable: do not "
            "convert the outputs to NumPy."
        )
    filled = [tf.zeros_like(part) if grad is None else grad for part, grad in zip(made, grads, strict=True)]
    return _Loss(value, flatten([tf.convert_to_tensor(grad) for grad in filled]), of, terms, violations, notes)


def _groups(groups: Groups, options: Options) -> Groups | None:
    if options.microbatch is not None and not groups.possible:
        raise ValueError(
            f"microbatch={options.microbatch} was asked for, but no input runs over the {groups.samples} samples along "
            "its first axis. Expected at least one that does. Leave microbatch unset."
        )
    return None if options.microbatch is None else groups


def _apart(
    run: Forward, inputs: Any, outputs: tf.Tensor, g: tf.Tensor, vjp: Callable, options: Options
) -> tuple[Callable | None, tf.Tensor | None, tuple[str, ...]]:
    """(sample_square_norms, whether the samples interact after all, notes)."""
    samples = outputs.shape[0]
    singles = Groups(run, inputs, tuple(outputs.shape), outputs.dtype)
    if not options.split:
        return None, None, ()
    if not singles.possible:
        return None, None, (f"no input runs over the {samples} samples along its first axis: they are not taken apart",)
    gradient = dict(zip(run.sources, vjp(g), strict=True))
    whole = outputs
    if options.microbatch == 1:  # cannot differ from single samples: pairs can
        whole, gradient, _ = replace(singles, size=2).seen(g)
    flat, grads, norms = singles.seen(g)
    flag = difference(flat, grads, whole, gradient) > coupling_tolerance(namespace, run.narrow)
    return (lambda v: norms if v is g else singles.square_norms(v)), flag, ()


def _jvp(tape: tf.GradientTape, outputs: list, sources: dict[str, Any], u: list[tf.Tensor]) -> tf.Tensor:
    """J u as the derivative of w -> <J^T w, u>, by a second pass through the first one's backward pass.

    Works through every operation that has a second derivative, loops and nested functions among them.
    """
    flat = flatten(outputs)
    with tf.GradientTape(watch_accessed_variables=False) as outer:
        w = tf.zeros_like(flat)
        outer.watch(w)
        pulled = gradients(tape, outputs, sources, w)
        dense = [tf.convert_to_tensor(pulled[name]) for name in sources]
    seeds = [tf.cast(tangent, grad.dtype) for tangent, grad in zip(u, dense, strict=True)]
    return outer.gradient(dense, w, seeds, tf.UnconnectedGradients.ZERO)


def _loss_along(
    run: Forward, inputs: Any, drawn: list[tf.Operation], loss: _Loss, u: list[tf.Tensor], step: Any
) -> tf.Tensor:
    def of() -> tf.Tensor:
        sources = {
            name: tf.convert_to_tensor(source) + tf.cast(step, source.dtype) * tf.cast(d, source.dtype)
            for (name, source), d in zip(run.sources.items(), u, strict=True)
        }
        outputs = moved(run, inputs, sources, drawn)
        return loss.of([tf.cast(part, wide([part])) for part in outputs])

    return tf.function(of, autograph=False)() if tf.executing_eagerly() else of()


def _signs(seed: Any, index: Any, like: tf.Tensor) -> tf.Tensor:
    pair = tf.stack([tf.cast(seed, tf.int64), tf.cast(index, tf.int64)])
    bits = tf.random.stateless_uniform(like.shape, pair, minval=0, maxval=2, dtype=tf.int32)
    return tf.cast(2 * bits - 1, like.dtype)


def _while_loop(condition: Callable, body: Callable, state: Any) -> Any:
    """Python's loop where there are values to look at, TensorFlow's in a graph."""
    if tf.executing_eagerly():
        return while_loop(condition, body, state)
    tensors = tf.nest.map_structure(tf.convert_to_tensor, state)

    def step(*state: Any) -> Any:
        made = tf.nest.map_structure(tf.convert_to_tensor, body(state))
        return tf.nest.map_structure(lambda new, old: tf.ensure_shape(new, old.shape), made, tensors)

    return tf.while_loop(lambda *state: condition(state), step, tensors, parallel_iterations=1)


def _dot(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    dtype = wide([a, b])
    return tf.reduce_sum(tf.cast(a, dtype) * tf.cast(b, dtype))
