"""The record that the core works on, for one batch. Safe to trace into a graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import tensorflow as tf

from lnp.contract import validation
from lnp.contract.linearization import Linearization, Subset, while_loop
from lnp.contract.options import Options
from lnp.losses.kinds import separable
from lnp_tensorflow import array_namespace, losses
from lnp_tensorflow.criterion import Criterion, criterion
from lnp_tensorflow.fallback import Groups, dot
from lnp_tensorflow.outputs import flatten, rebuild, split, wide
from lnp_tensorflow.replay import Forward, draws_since, in_xla, made_since, moved, operations
from lnp_tensorflow.self_check import Apart, Verdict, compare, cut, general_note
from lnp_tensorflow.separable import found_separable
from lnp_tensorflow.state_guard import undisturbed
from lnp_tensorflow.taps.backward_pass import Norms, Tapped, Uses, recorded

UNROLLED = 16
"""Turns of a loop that are written out where the network pools maxima: in a loop TensorFlow looks for them again,
which takes half a training step for each probe of a convolutional network."""
CHANGING = (
    "the loss draws random numbers, calls Python while it runs, or keeps a state: it is not tried for whether it is a "
    "mean over samples, and numbers that it draws are not those of the step"
)
ONE = 0x3F800000
"""The bits of 1.0 in float32."""


@dataclass(frozen=True)
class _Loss:
    value: tf.Tensor
    gradient: tf.Tensor
    of: Criterion
    terms: Any
    separable: bool
    violations: tuple
    notes: tuple[str, ...]


def record(
    run: Forward,
    inputs: Any,
    targets: Any,
    seed: Any,
    options: Options,
    notes: tuple[str, ...],
    verdict: Verdict | None = None,
) -> Linearization:
    """Linearise the model on a batch.

    `verdict` says how its samples can be taken apart: without one, that is found out by the record itself. `notes` say
    what is known already.
    """
    before = operations()
    batch = recorded(run, inputs)
    drawn, outputs = draws_since(before), batch.outputs
    pools = any("MaxPool" in op.type for op in made_since(before))
    flat = flatten(outputs)
    groups = _groups(Groups(run, inputs, tuple(flat.shape), flat.dtype, options.microbatch or 1), options)
    if groups is not None:
        flat = groups.outputs()  # in a graph, the pass over the whole batch is not run if nothing else needs it
    loss = _loss(flat, outputs, batch.returned, targets, options)
    if loss.of.draws_in_python:
        run.drawing.append("the loss")
    pulls = _Pulls(batch, groups, loss.gradient)
    first = batch if groups is None else None
    apart = Apart(run, inputs, tuple(flat.shape), flat.dtype, batch=first, microbatch=options.microbatch)
    taken = _taken_apart(apart, pulls, options, verdict)
    return Linearization(
        xp=array_namespace,
        outputs=flat,
        loss=loss.value,
        loss_gradient=loss.gradient,
        loss_terms=loss.terms,
        vjp=pulls.vjp,
        inner_products=lambda u, w: {name: dot(a, b) for name, a, b in zip(run.sources, u, w, strict=True)},
        signs=lambda index: _signs(seed, index, flat),
        # XLA computes the second derivative of max-pooling wrongly in float32
        jvp=None if in_xla() else lambda u: _jvp(batch, u),
        sample_square_norms=taken.square_norms,
        subset=_subsets(taken, pulls, seed),
        cheap=taken.cheap,
        coupled=taken.coupled,
        group_square_norms=None if groups is None else groups.square_norms,
        groups=1 if groups is None else groups.count,
        loss_along=lambda u, step: _loss_along(run, inputs, drawn, loss, u, step),
        separable=loss.separable,
        violations=loss.violations,
        notes=(*notes, *loss.notes, *taken.notes),
        while_loop=partial(_while_loop, unrolled=UNROLLED if pools else 0),
    )


class _Pulls:
    """Pull-backs; that of the loss gradient is traced once, for the gradient and for single samples."""

    def __init__(self, batch: Tapped, groups: Groups | None, g: tf.Tensor) -> None:
        self._batch, self._groups, self.g = batch, groups, g
        self._cotangents: list | None = None
        self._said: dict[tuple[str, ...], Uses] = {}
        if groups is None and not tf.executing_eagerly():
            gradient, self._cotangents = batch.pulled(g)
            self._gradient = [tf.convert_to_tensor(part) for part in gradient.values()]

    def vjp(self, v: tf.Tensor) -> list[tf.Tensor]:
        """J^T v."""
        if v is self.g and self._cotangents is not None:
            return self._gradient
        pulled = self._batch.pulled(v)[0] if self._groups is None else self._groups.vjp(v)
        return [tf.convert_to_tensor(part) for part in pulled.values()]

    def square_norms(self, apart: Apart, v: tf.Tensor) -> Norms:
        """Of single samples' gradients."""
        return apart.square_norms(v, self.uses(apart) if v is self.g else None)

    def along(self, apart: Apart, some: Apart, index: tf.Tensor, u: dict[str, tf.Tensor]) -> tf.Tensor:
        """<J_m^T g_m, u> of some of the samples, from taps where they have told it already."""
        uses = self.uses(apart) or {}
        found = self._batch.along(uses, u, index)
        missing = {name: part for name, part in u.items() if name not in uses}
        if missing:
            found |= some.along(tf.gather(self.g, index), missing)
        return tf.add_n([tf.cast(part, self.g.dtype) for part in found.values()])

    def uses(self, apart: Apart) -> Uses | None:
        """What the taps have said of the loss gradient's samples; first to be asked outside of branches."""
        if self._cotangents is None or self._batch.samples == 1:
            return None
        if apart.general not in self._said:
            self._said[apart.general] = apart.uses(self._batch, self._cotangents)
        return self._said[apart.general]


@dataclass(frozen=True)
class _Taken:
    """How single samples are measured."""

    apart: Apart
    square_norms: Callable | None = None
    wrong: tf.Tensor | None = None
    cheap: bool = False
    coupled: tf.Tensor | None = None
    notes: tuple[str, ...] = ()


def _taken_apart(apart: Apart, pulls: _Pulls, options: Options, verdict: Verdict | None) -> _Taken:
    if not options.split:
        return _Taken(apart)
    if verdict is not None:
        made = replace(apart, general=tuple(name for name, _ in verdict.general), expanded=verdict.expanded)
        square_norms = lambda v: pulls.square_norms(made, v)
        return _Taken(made, square_norms, None, not verdict.general, None, general_note(verdict.general))
    seen = compare(apart.run, apart.inputs, apart.microbatch, apart.batch)
    if seen.impossible:
        return _Taken(apart, notes=(seen.impossible,))
    made = replace(apart, general=tuple(seen.unread), expanded=seen.expanded)
    missed = [missed > 2 * seen.tolerance for missed in seen.missed.values()]
    wrong, _ = tf.reduce_any(missed) if missed else None, pulls.uses(made)
    general = replace(apart, general=tuple(apart.run.sources))

    def checked(v: tf.Tensor) -> Norms:
        """Taps where they are right: which is known only when the graph runs."""
        if wrong is None:
            return pulls.square_norms(made, v)
        either = (lambda: list(general.square_norms(v).values())), (lambda: list(pulls.square_norms(made, v).values()))
        return dict(zip(apart.run.sources, tf.cond(wrong, *either), strict=True))

    coupled = (seen.coupling > seen.tolerance) | (seen.bend > seen.tolerance)
    notes = general_note(seen.unread.items())
    return _Taken(made, checked, wrong, not seen.unread, coupled, notes)


def _subsets(taken: _Taken, pulls: _Pulls, seed: Any) -> Callable[[int], Subset] | None:
    """M -> M samples drawn at random, with a forward pass of their own where one is needed."""
    if taken.square_norms is None:
        return None
    apart, samples, names = taken.apart, taken.apart.shape[0], list(taken.apart.run.sources)

    def subset(size: int) -> Subset:
        pair = tf.stack([tf.cast(seed, tf.int64), tf.constant(samples, tf.int64)])
        order = tf.random.stateless_uniform((samples,), pair)
        index = tf.sort(tf.argsort(order)[:size])
        inputs = cut(apart.inputs, index, samples)
        some = replace(apart, inputs=inputs, shape=(size, apart.shape[1]), batch=None)

        def along(u: list[tf.Tensor]) -> tf.Tensor:
            by_name = dict(zip(names, u, strict=True))
            by_taps = lambda: pulls.along(apart, some, index, by_name)
            if taken.wrong is None:
                return by_taps()
            general = replace(apart, general=tuple(names))
            return tf.cond(
                taken.wrong, lambda: pulls.along(general, replace(some, general=tuple(names)), index, by_name), by_taps
            )

        return Subset(index, some.square_norms, along=along)

    return subset


def _loss(flat: tf.Tensor, outputs: list, returned: Any, targets: Any, options: Options) -> _Loss:
    """L and dL/df, in float32 or better."""
    if tf.is_tensor(targets):
        validation.check_lengths(flat.shape[0], tuple(targets.shape))
    made = [tf.cast(part, wide([part])) for part in split(flat, outputs)]
    with undisturbed(options.loss):
        function, terms, violations, notes = losses.prepare(
            options.loss, rebuild(returned, made), targets, options.loss_terms
        )

    def scalar(outputs: list[tf.Tensor]) -> tf.Tensor:
        value = tf.convert_to_tensor(function(rebuild(returned, outputs), targets))
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
    wanted = options.split and options.population is not False
    known = separable(options.loss) or (wanted and _tried(of, function, rebuild(returned, made), targets))
    gradient = flatten([tf.convert_to_tensor(grad) for grad in filled])
    return _Loss(value, gradient, of, terms, known, violations, (*notes, *([CHANGING] if of.changes else [])))


def _tried(of: Criterion, function: Callable, outputs: Any, targets: Any) -> bool:
    """Whether the loss is a mean over samples, where it can be called again and again to find out."""
    if of.changes:
        return False
    with undisturbed(of.loss):
        return found_separable(function, outputs, targets)


def _groups(groups: Groups, options: Options) -> Groups | None:
    if options.microbatch is not None and not groups.possible:
        raise ValueError(
            f"microbatch={options.microbatch} was asked for, but no input runs over the {groups.samples} samples along "
            "its first axis. Expected at least one that does. Leave microbatch unset."
        )
    return None if options.microbatch is None else groups


def _jvp(batch: Tapped, u: list[tf.Tensor]) -> tf.Tensor:
    """J u as the derivative of w -> <J^T w, u>, by a second pass through the first one's backward pass.

    Works through every operation that has a second derivative, loops and nested functions among them.
    """
    flat = flatten(batch.outputs)
    with tf.GradientTape(watch_accessed_variables=False) as outer:
        w = tf.zeros_like(flat)
        outer.watch(w)
        dense = [tf.convert_to_tensor(part) for part in batch.pulled(w)[0].values()]
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
        return loss.of.again([tf.cast(part, wide([part])) for part in outputs])

    return tf.function(of, autograph=False)() if tf.executing_eagerly() else of()


def _signs(seed: Any, index: Any, like: tf.Tensor) -> tf.Tensor:
    """Each random bit is the sign bit of a 1."""
    pair = tf.stack([tf.cast(seed, tf.int64), tf.cast(index, tf.int64)])
    size = math.prod(like.shape)
    words = tf.random.stateless_uniform((-(-size // 32), 1), pair, minval=None, maxval=None, dtype=tf.int32)
    sign = tf.bitwise.bitwise_and(tf.bitwise.left_shift(words, tf.range(32)), tf.int32.min)
    ones = tf.bitcast(tf.bitwise.bitwise_or(sign, ONE), tf.float32)
    return tf.cast(tf.reshape(tf.reshape(ones, (-1,))[:size], like.shape), like.dtype)


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
