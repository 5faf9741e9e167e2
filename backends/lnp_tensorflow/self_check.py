"""Samples taken apart: squared norms of their gradients, from taps where the operations are known.

Once per model and shapes, taps are compared with single samples that run on their own. What differs takes the general
way, one sample at a time; where single samples differ from the batch itself, they interact, and none are taken apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from lnp.contract.linearization import coupling_tolerance
from lnp.contract.trees import map_leaves
from lnp_tensorflow import array_namespace
from lnp_tensorflow.fallback import (
    Gradients,
    Groups,
    difference,
    difference_of_gradients,
    dot,
    has_samples,
    square_norm,
)
from lnp_tensorflow.outputs import flatten
from lnp_tensorflow.replay import Forward, made_since
from lnp_tensorflow.taps.backward_pass import Norms, Tapped, Uses, recorded

CHECKED = 8
"""Samples that are compared, spread over the batch."""
COUPLED = (
    "the samples interact in this network (a sample's output or gradient changes when the others are left out; "
    "dropout and batch normalisation in training mode do that too): they are not taken apart"
)
BENT = (
    "the network's backward pass is not linear (a custom gradient that clips or normalises does that): it is not that "
    "of a Jacobian, which chi_net and chi_pos are about"
)
NAMED = 4
"""Parameters that a note names."""


@dataclass(frozen=True)
class Verdict:
    """What comparing taps with single samples has shown.

    Attributes
    ----------
    general:
        (parameter that takes the general way, why) pairs.
    coupled:
        Why they are not taken apart, or nothing.
    bent:
        Whether the backward pass is not linear.
    expanded:
        As in `Tapped`, where they were compared.
    """

    general: tuple[tuple[str, str], ...] = ()
    coupled: str = ""
    bent: bool = False
    expanded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Taps beside single samples on their own.

    Attributes
    ----------
    coupling:
        Largest relative difference of outputs or gradient between single samples and the batch, shape ().
    missed:
        {parameter: relative difference of the squared norms, shape ()}.
    unread:
        {parameter that has no taps: why}.
    tolerance:
        What coupling may be.
    expanded:
        As in `Tapped`.
    bend:
        Relative difference between J^T v and 4 J^T (v / 4), shape ().
    impossible:
        Why single samples cannot be run, or nothing.
    """

    coupling: Any
    missed: dict[str, Any]
    unread: dict[str, str]
    tolerance: float
    expanded: tuple[str, ...]
    bend: Any
    impossible: str = ""

    def verdict(self) -> Verdict:
        """From numbers."""
        differing = {
            n: "its taps differ from single samples" for n, m in self.missed.items() if not m <= 2 * self.tolerance
        }
        coupled = self.impossible or (COUPLED if self.coupling > self.tolerance else "")
        return Verdict(tuple((self.unread | differing).items()), coupled, self.bend > self.tolerance, self.expanded)


def compare(run: Forward, inputs: Any, microbatch: int | None = None, batch: Tapped | None = None) -> Comparison:
    """Pull random signs back to a few samples, with zero at the others, by taps and one sample at a time.

    With micro-batches, in one of at least two samples: single ones could not differ from themselves. `batch` is the
    model on the inputs, if it has run.
    """
    if batch is None or microbatch is not None:
        batch = recorded(run, inputs)
    if microbatch is not None:
        samples = batch.samples
        inputs = cut(inputs, _spread(samples, min(samples, max(2, min(microbatch, CHECKED)))), samples)
        batch = recorded(run, inputs)
    few = min(CHECKED, batch.samples) if microbatch is None else -(-batch.samples // 2)
    index = _spread(batch.samples, few)
    whole = flatten(batch.outputs)
    signs = tf.cast(2 * tf.random.stateless_uniform((few, whole.shape[1]), (0, 0), 0, 2, tf.int32) - 1, whole.dtype)
    # of different lengths: signs alone give the biases of all samples the same norm, whichever sample they belong to
    signs *= tf.constant(np.linspace(0.5, 1.5, few)[:, None], whole.dtype)
    v = tf.scatter_nd(tf.constant(index)[:, None], signs, whole.shape)
    gradient, cotangents = batch.pulled(v)
    bend, tolerance = _bend(batch, v, gradient), coupling_tolerance(array_namespace, run.narrow)
    singles = Groups(run, cut(inputs, index, batch.samples), (few, whole.shape[1]), whole.dtype)
    impossible = partial(Comparison, math.inf, {}, {}, tolerance, batch.expanded, bend)
    if not Groups(run, inputs, tuple(whole.shape), whole.dtype).possible:
        return impossible(
            f"no input runs over the {batch.samples} samples along its first axis: they are not taken apart"
        )
    if run.varying:
        return impossible(run.varying)
    try:
        flat, grads, expected = singles.seen(signs)
    except tf.errors.OperatorNotAllowedInGraphError:  # the network needs AutoGraph
        raise
    except Exception as error:  # whatever the user's network raises for a part of its batch
        return impossible(alone_note(error))
    uses, unread = batch.uses(cotangents)
    missed = _missed(batch.square_norms(uses), expected, index)
    coupling = difference(flat, grads, tf.gather(whole, index), gradient)
    return Comparison(coupling, missed, unread, tolerance, batch.expanded, bend)


def _bend(batch: Tapped, v: tf.Tensor, gradient: Gradients) -> tf.Tensor:
    """How far the backward pass is from linear, where the network has one of its own."""
    if not any(op.type == "IdentityN" for op in made_since(0)):  # what custom gradients leave in a graph
        return tf.constant(0.0, tf.float64)
    again = {name: 4 * tf.convert_to_tensor(part) for name, part in batch.pulled(v / 4)[0].items()}
    return difference_of_gradients(again, gradient)


def alone_note(error: Exception) -> str:
    """That some of the samples cannot be run without the others, and why."""
    first = (str(error).splitlines() or [""])[0][:150]
    return f"single samples cannot be run, so that they are not taken apart: {type(error).__name__}: {first}"


def _missed(found: Norms, expected: Norms, index: list[int]) -> dict[str, tf.Tensor]:
    """How far taps are from single samples, where nothing may arrive at the others."""
    if not found:
        return {}
    taps = tf.stack([tf.cast(norm, tf.float64) for norm in found.values()])
    single = {name: tf.cast(norm, tf.float64) for name, norm in expected.items()}
    total, own = tf.add_n(list(single.values())), tf.stack([single[name] for name in found])
    missed = tf.abs(tf.gather(taps, index, axis=1) - own) / tf.maximum(own + 1e-3 * total, 1e-300)
    others = tf.constant([n not in index for n in range(taps.shape[1])])
    leaked = tf.where(others, taps, tf.zeros_like(taps)) / tf.maximum(tf.reduce_max(total), 1e-300)
    worst = tf.maximum(tf.reduce_max(missed, 1), tf.reduce_max(leaked, 1))
    return dict(zip(found, tf.unstack(worst), strict=True))


def _spread(samples: int, few: int) -> list[int]:
    return sorted({round(i * (samples - 1) / max(few - 1, 1)) for i in range(few)})


def cut(inputs: Any, index: Any, samples: int) -> Any:
    """The inputs of some samples."""
    return map_leaves(lambda leaf: tf.gather(leaf, index) if has_samples(leaf, samples) else leaf, inputs)


@dataclass(frozen=True)
class Apart:
    """Some samples, each taken by itself.

    Attributes
    ----------
    run, inputs:
        The model and what goes in.
    shape, dtype:
        Of the outputs, (N, K).
    general:
        Parameters that take the general way.
    expanded:
        As in `Tapped`, where taps were compared with single samples: another number of samples, which may happen to be
        another size in the network, must not be read in another way.
    batch:
        The samples after a forward pass, or None to run one when it is needed, in micro-batches of
    microbatch:
        samples.
    """

    run: Forward
    inputs: Any
    shape: tuple[int, int]
    dtype: tf.DType
    general: tuple[str, ...] = ()
    expanded: tuple[str, ...] = ()
    batch: Tapped | None = None
    microbatch: int | None = None

    @property
    def singles(self) -> Groups:
        """One sample at a time."""
        return Groups(self.run, self.inputs, self.shape, self.dtype)

    def uses(self, batch: Tapped, cotangents: list) -> Uses:
        """What taps say, where they are right."""
        other = () if batch.expanded == self.expanded else (*batch.expanded, *self.expanded)
        return batch.uses(cotangents, {*self.general, *other})[0]

    def square_norms(self, v: tf.Tensor, uses: Uses | None = None) -> Norms:
        """{parameter: (N,) array of ||J_n^T v_n||^2}; the batch's taps may have been asked already."""
        return self._each(v, uses, lambda batch, uses: batch.square_norms(uses), lambda name, g: square_norm(g))

    def along(self, v: tf.Tensor, u: Mapping[str, tf.Tensor], uses: Uses | None = None) -> Norms:
        """{parameter: (N,) array of <J_n^T v_n, u>} of the parameters that u has."""
        return self._each(v, uses, lambda batch, uses: batch.along(uses, u), lambda name, g: dot(g, u[name]), tuple(u))

    def _each(
        self, v: tf.Tensor, uses: Uses | None, by_taps: Callable, by_gradient: Callable, wanted: tuple = ()
    ) -> Norms:
        """{parameter: (N,)} of what `by_taps(batch, uses)` says, elsewhere of numbers `by_gradient(name, gradient)`."""
        if self.microbatch is not None and self.microbatch < self.shape[0]:
            alone = replace(self, batch=None, microbatch=None)
            part = lambda inputs, v: replace(alone, inputs=inputs, shape=tuple(v.shape))._each(
                v, None, by_taps, by_gradient, wanted
            )
            return replace(self.singles, size=self.microbatch, wanted=wanted or None).each(part, v)
        names = wanted or tuple(self.run.sources)
        known: Norms = {}
        if not set(names) <= set(self.general):
            batch = self.batch or recorded(self.run, self.inputs)
            if batch.samples == 1:
                return {name: by_gradient(name, g)[None] for name, g in batch.pulled(v)[0].items() if name in names}
            if uses is None:
                uses = self.uses(batch, batch.pulled(v, gradient=False)[1])
            known = by_taps(batch, {name: uses[name] for name in names if name in uses})
        missing = tuple(name for name in names if name not in known)
        single = replace(self.singles, wanted=missing).numbers(v, by_gradient) if missing else {}
        return {name: known[name] if name in known else single[name] for name in names}


def general_note(general: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Which parameters take the general way, and why."""
    named = [f"{name} ({why})" for name, why in general]
    if not named:
        return ()
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return (f"single samples run on their own, which is slower, for {', '.join(named[:NAMED])}{more}",)
