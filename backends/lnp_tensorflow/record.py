"""The record that the core works on, for one batch. Safe to trace into a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import tensorflow as tf

from lnp.contract import validation
from lnp.contract.linearization import GradientPass, Linearization, Vector, coupling_tolerance, unit, while_loop
from lnp.contract.options import Options
from lnp.losses.evidence import told
from lnp.losses.kinds import Prepared
from lnp.per_sample.self_check import bend_of_batch
from lnp.per_sample.verdict import BENT
from lnp_tensorflow import array_namespace, losses
from lnp_tensorflow.apart import Apart, apart
from lnp_tensorflow.criterion import Criterion, criterion
from lnp_tensorflow.fallback import Gradients, Groups, dot
from lnp_tensorflow.outputs import flatten, rebuild, split, wide
from lnp_tensorflow.replay import Forward, draws_since, in_xla, made_since, moved, operations
from lnp_tensorflow.self_check import Checked, Network
from lnp_tensorflow.signs import signs_of
from lnp_tensorflow.single_samples import Samples
from lnp_tensorflow.state_guard import undisturbed
from lnp_tensorflow.taps.backward_pass import Tapped, recorded

UNROLLED = 16
"""Turns of a loop that are written out where the network pools maxima: in a loop TensorFlow looks for them again,
which takes half a training step for each probe of a convolutional network."""
CHANGING = (
    "the loss draws random numbers, calls Python while it runs, or keeps a state: it is not tried for whether it is a "
    "mean over samples, and numbers that it draws are not those of the step"
)
TWICE = (
    "The backward pass of this network cannot be differentiated itself (that of tf.recompute_grad cannot), which gives "
    "the products J u that a spectrum or a kernel is made of. Expected operations with second derivatives. Pass "
    "forward=, a function (model, inputs) -> outputs that does not recompute; lnp.decompose needs no such product."
)


@dataclass(frozen=True)
class _Loss:
    """The loss at the batch's outputs, and what is known of it: see `lnp.losses.kinds.Prepared`.

    `alone` gives the losses of single samples, (N,), of a loss that is the same at every call.
    """

    value: tf.Tensor
    gradient: tf.Tensor
    of: Criterion
    prepared: Prepared
    separable: bool
    alone: Callable[[], tf.Tensor] | None


def record(
    run: Forward,
    inputs: Any,
    targets: Any,
    seed: Any,
    options: Options,
    notes: tuple[str, ...] = (),
    checked: Checked | None = None,
    turn: tf.Tensor | None = None,
) -> Linearization:
    """Linearise the model on a batch.

    Parameters
    ----------
    notes:
        What is known already.
    checked:
        How its samples can be taken apart; without, that is found out by the record itself.
    turn:
        The number of the measurement, shape (): another sample is looked at each time.
    """
    before = operations()
    batch = recorded(run, inputs, None if options.split else 0)
    drawn = draws_since(before)
    pools = any("MaxPool" in op.type for op in made_since(before))
    flat = flatten(batch.outputs)
    groups = _groups(Groups(run, inputs, tuple(flat.shape), flat.dtype, options.microbatch or 1), options)
    if groups is not None:
        flat = groups.outputs()  # in a graph, the pass over the whole batch is not run if nothing else needs it
    loss = _loss(flat, batch, targets, options)
    if loss.of.draws_in_python:
        run.drawing.append("the loss")
    g, magnitude = unit(array_namespace, loss.gradient)
    passes = _Passes(batch, groups, g)
    samples = Samples(run, inputs, tuple(flat.shape), flat.dtype, microbatch=options.microbatch)
    samples = replace(samples, batch=batch if groups is None else None)
    signs = signs_of(seed, flat, batch.outputs)
    taken, why = apart(samples, g, magnitude, flat, passes.cotangents, signs, options, checked, turn)
    lin = Linearization(
        xp=array_namespace,
        outputs=flat,
        loss=loss.value,
        loss_gradient=loss.gradient,
        loss_terms=loss.prepared.terms,
        vjp=passes.vjp,
        inner_products=passes.inner_products,
        signs=signs,
        # XLA computes the second derivative of max-pooling wrongly in float32
        jvp=None if in_xla() else lambda u: _jvp(batch, u),
        gradient_pass=lambda per_sample, products, vector: replace(
            _gradient_pass(passes, taken, per_sample, products, vector), magnitude=magnitude
        ),
        subset_pays=not batch.loops,
        loss_along=lambda u, step: _loss_along(run, inputs, drawn, loss, u, step),
        separable=loss.separable,
        sample_terms=loss.prepared.sample_terms,
        sample_losses=loss.alone,
        violations=(*loss.prepared.violations, *(taken.violations if taken else _bent(run, inputs, batch, loss))),
        notes=(*notes, *run.notes, *loss.prepared.notes, *([CHANGING] if loss.of.changes else []), *why),
        while_loop=partial(_while_loop, unrolled=UNROLLED if pools else 0),
        **told(array_namespace, loss.prepared, loss.gradient),
    )
    if taken is not None:
        lin = taken.offered_in(lin)
    return lin if groups is None else replace(lin, group_square_norms=groups.square_norms, groups=groups.count)


class _Passes:
    """Pull-backs of a batch. In a graph that of the loss gradient is there from the start: what nobody uses of it is
    not run.
    """

    def __init__(self, batch: Tapped, groups: Groups | None, g: tf.Tensor) -> None:
        self._batch, self._groups, self._g = batch, groups, g
        self._gradient: Gradients | None = None
        self.cotangents: list | None = None
        if groups is None and not tf.executing_eagerly():
            self._gradient, self.cotangents = batch.pulled(g)

    def vjp(self, v: tf.Tensor) -> dict[str, tf.Tensor]:
        """J^T v."""
        return _dense(self._batch.pulled(v)[0] if self._groups is None else self._groups.vjp(v))

    def gradient(self) -> dict[str, tf.Tensor]:
        """J^T g."""
        return self.vjp(self._g) if self._gradient is None else _dense(self._gradient)

    def inner_products(self, u: Vector, w: Vector) -> dict[str, tf.Tensor]:
        """{parameter: <u_l, w_l>} in one dtype, which parameters need not have."""
        return {name: tf.cast(dot(part, w[name]), self._g.dtype) for name, part in u.items()}


def _dense(gradient: Gradients) -> dict[str, tf.Tensor]:
    return {name: tf.convert_to_tensor(part) for name, part in gradient.items()}


def _gradient_pass(
    passes: _Passes, taken: Apart | None, per_sample: bool, products: int, vector: bool
) -> GradientPass:  # fmt: skip
    """What one backward pass of the loss yields: its cotangents at the taps give what single samples do."""
    gradient = passes.gradient()
    found = GradientPass(passes.inner_products(gradient, gradient), vector=gradient if vector else None)
    if taken is None:
        return found
    if per_sample:
        found = replace(found, sample_square_norms=taken.square_norms_of_gradient())
    if products:
        some, index = taken.products(products, gradient)
        found = replace(found, products=some, index=index)
    return found


def _loss(flat: tf.Tensor, batch: Tapped, targets: Any, options: Options) -> _Loss:
    """L and dL/df, in float32 or better."""
    if tf.is_tensor(targets):
        validation.check_lengths(flat.shape[0], tuple(targets.shape))
    made = [tf.cast(part, wide([part])) for part in split(flat, batch.outputs)]
    returned = rebuild(batch.returned, made)
    with undisturbed(options.loss):
        prepared = losses.prepare(options.loss, returned, targets, options.loss_terms)

    def scalar(outputs: list[tf.Tensor]) -> tf.Tensor:
        value = tf.convert_to_tensor(prepared.function(rebuild(returned, outputs), targets))
        validation.check_loss(tuple(value.shape))
        return tf.cast(tf.reshape(value, ()), flat.dtype)

    of = criterion(scalar, options.loss, made)
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
    gradient = flatten([tf.convert_to_tensor(grad) for grad in filled])
    separable = prepared.separable
    if not separable and options.split and options.population is not False and not of.changes:
        with undisturbed(options.loss):
            separable = losses.is_mean_over_samples(prepared.function, returned, targets)
    alone = (
        None if of.changes else partial(losses.alone, prepared.function, options.loss, returned, targets, flat.dtype)
    )
    return _Loss(value, gradient, of, prepared, separable, alone)


def _groups(groups: Groups, options: Options) -> Groups | None:
    if options.microbatch is not None and not groups.possible:
        raise ValueError(
            f"microbatch={options.microbatch} was asked for, but no input runs over the {groups.samples} samples along "
            "its first axis. Expected at least one that does. Leave microbatch unset."
        )
    return None if options.microbatch is None else groups


def _bent(run: Forward, inputs: Any, batch: Tapped, loss: _Loss) -> tuple[tuple[tf.Tensor, str], ...]:
    """Whether the backward pass of a whole batch is not linear, where somebody wrote it. float16 lacks the digits."""
    if not run.custom_backward or run.narrow == tf.float16:
        return ()
    bend = bend_of_batch(Network(run, inputs, batch), loss.gradient)
    return ((bend > coupling_tolerance(array_namespace, run.narrow), BENT),)


def _jvp(batch: Tapped, u: Vector) -> tf.Tensor:
    """J u as the derivative of w -> <J^T w, u>, by a second pass through the first one's backward pass.

    Works through every operation that has a second derivative, loops and nested functions among them.
    """
    flat = flatten(batch.outputs)
    with tf.GradientTape(watch_accessed_variables=False) as outer:
        w = tf.zeros_like(flat)
        outer.watch(w)
        dense = _dense(batch.pulled(w)[0])
    seeds = [tf.cast(u[name], grad.dtype) for name, grad in dense.items()]
    try:
        return outer.gradient(list(dense.values()), w, seeds, tf.UnconnectedGradients.ZERO)
    except (NotImplementedError, LookupError) as error:
        raise ValueError(TWICE) from error


def _loss_along(
    run: Forward, inputs: Any, drawn: list[tf.Operation], loss: _Loss, u: Vector, step: Any
) -> tf.Tensor:  # fmt: skip
    """L at the parameters theta + step u, with the random numbers that the batch's pass has drawn."""

    def of() -> tf.Tensor:
        sources = {
            name: tf.convert_to_tensor(source) + tf.cast(step, source.dtype) * tf.cast(u[name], source.dtype)
            for name, source in run.sources.items()
        }
        outputs = moved(run, inputs, sources, drawn)
        return loss.of.again([tf.cast(part, wide([part])) for part in outputs])

    return tf.function(of, autograph=False)() if tf.executing_eagerly() else of()


def _while_loop(condition: Callable, body: Callable, state: Any, unrolled: int = 0) -> Any:
    """Python's loop where there are values to look at, TensorFlow's in a graph.

    A number of turns that is known, and at most `unrolled`, is written out, one after the other.
    """
    if tf.executing_eagerly():
        return while_loop(condition, body, state)
    if unrolled and isinstance(state[0], int) and condition((state[0] + unrolled, *state[1:])) is False:
        while condition(state) is True:
            with tf.control_dependencies([part for part in state if tf.is_tensor(part)]):
                state = body(state)
        if condition(state) is False:
            return state
    tensors = tf.nest.map_structure(tf.convert_to_tensor, state)

    def step(*state: Any) -> Any:
        made = tf.nest.map_structure(tf.convert_to_tensor, body(state))
        return tf.nest.map_structure(lambda new, old: tf.ensure_shape(new, old.shape), made, tensors)

    return tf.while_loop(lambda *state: condition(state), step, tensors, parallel_iterations=1)
