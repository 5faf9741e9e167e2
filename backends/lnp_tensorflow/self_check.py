"""What the core's self-check asks of a network: passes of the batch, and of single samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from lnp.contract.linearization import Array, Vector, coupling_tolerance
from lnp.per_sample.self_check import (
    COMPARED,
    SMALLER,
    Alone,
    Differences,
    Pulled,
    bend_at,
    bend_of_loss,
    compare,
    first_that_runs,
    look,
)
from lnp.per_sample.verdict import Verdict
from lnp_tensorflow import array_namespace as xp
from lnp_tensorflow.fallback import FATAL, Gradients, Groups, Norms, cut, square_norm
from lnp_tensorflow.outputs import flatten
from lnp_tensorflow.replay import Forward
from lnp_tensorflow.single_samples import Samples
from lnp_tensorflow.taps.backward_pass import Tapped, Uses, recorded

FEW = 32
"""Samples of a batch whose single samples are all run in one loop: tracing a second one takes longer."""


@dataclass
class Network:
    """A network on a batch, as `lnp.per_sample.self_check.Operations`.

    Attributes
    ----------
    run, inputs, batch:
        The model, what goes in, and its pass over that.
    size:
        Samples of a group in which all samples are run apart from the batch: 1, or more where there are none to spare.
    """

    run: Forward
    inputs: Any
    batch: Tapped
    size: int = 1

    def __post_init__(self) -> None:
        self.xp: Any = xp
        self.outputs: Array = flatten(self.batch.outputs)
        self.custom_backward = self.run.custom_backward
        self._outputs_alone: tf.Tensor | None = None

    def pull(self, v: Array) -> Pulled:
        """One backward pass of the whole batch."""
        gradient, cotangents = self.batch.pulled(v)
        uses, missing = self.batch.uses(cotangents)
        return Pulled(_in_one_dtype(gradient, v.dtype), self.batch.square_norms(uses), missing)

    def alone(self, index: Sequence[int], v: Array) -> Alone:
        """Some samples, one by one; of a small batch all, of which the others have a cotangent of zero."""
        some = cut(self.inputs, list(index), self.batch.samples)
        if self.batch.samples > FEW:
            outputs, gradient, norms = Groups(self.run, some, tuple(v.shape), v.dtype).alone(v)
            return Alone(outputs, _in_one_dtype(gradient, v.dtype), norms)
        placed = tf.scatter_nd([[sample] for sample in index], v, self.outputs.shape)
        outputs, gradient, norms = Groups(self.run, self.inputs, tuple(placed.shape), v.dtype).alone(placed)
        self._outputs_alone = outputs
        own = {name: tf.gather(each, list(index)) for name, each in norms.items()}
        return Alone(tf.gather(outputs, list(index)), _in_one_dtype(gradient, v.dtype), own)

    def outputs_alone(self) -> Array:
        """(N, K) outputs of all samples, apart from the batch."""
        if self._outputs_alone is not None:
            return self._outputs_alone
        groups = Groups(self.run, self.inputs, tuple(self.outputs.shape), self.outputs.dtype, self.size)
        return groups.outputs()


def _in_one_dtype(gradient: Gradients, dtype: tf.DType) -> dict[str, tf.Tensor]:
    """Parameters may have several, which TensorFlow does not add."""
    return {name: tf.cast(tf.convert_to_tensor(part), dtype) for name, part in gradient.items()}


@dataclass(frozen=True)
class Comparison:
    """The batch beside single samples.

    Attributes
    ----------
    differences, missing:
        As `lnp.per_sample.self_check.compare` has them, or None and nothing where single samples cannot be run.
    reason:
        Why they cannot, or "".
    tolerance:
        What differences may be.
    expanded:
        As in `Tapped`.
    """

    differences: Differences | None
    missing: dict[str, str]
    reason: str
    tolerance: float
    expanded: tuple[str, ...]

    def verdict(self) -> Verdict:
        """What follows, once the differences are numbers."""
        if self.differences is None:
            return Verdict(self.reason)
        return self.differences.verdict(self.tolerance, self.missing)

    @property
    def coupled(self) -> tf.Tensor:
        """Whether the samples interact, or the backward pass bends, unless the batch itself is not finite. Shape ()."""
        assert self.differences is not None, "single samples were run"
        found = [self.differences.outputs, self.differences.gradient, self.differences.bend]
        return tf.equal(self.differences.batch, 0) & tf.logical_not(_within(self.tolerance, found))

    @property
    def wrong(self) -> tf.Tensor | None:
        """Whether any rule is wrong, shape (); None where there are none."""
        assert self.differences is not None, "single samples were run"
        rules = list(self.differences.rules.values())
        return tf.logical_not(_within(2 * self.tolerance, rules)) if rules else None


@dataclass(frozen=True)
class Checked:
    """What is remembered of a comparison: the verdict, and `Tapped.expanded` of the pass that was compared."""

    verdict: Verdict
    expanded: tuple[str, ...] = ()


def compared(
    run: Forward, inputs: Any, microbatch: int | None = None, batch: Tapped | None = None, *, thorough: bool = True
) -> Comparison:
    """Compare a batch, or where it must not be in memory as a whole some of its samples, with single samples.

    Parameters
    ----------
    batch:
        The model on the inputs, if it has run.
    thorough:
        Whether all samples are run by themselves. Else they are run in groups: each time that a graph runs, for its
        verdict is not remembered.
    """
    if batch is None or microbatch is not None:
        batch = recorded(run, inputs)
    samples, shape = batch.samples, tuple(flatten(batch.outputs).shape)
    possible = Groups(run, inputs, shape, tf.float32).possible
    if microbatch is not None:  # at least two: single ones could not differ from themselves
        few = _spread(samples, max(2, min(microbatch, COMPARED)))
        inputs = cut(inputs, few, samples)
        batch = recorded(run, inputs, len(few))
    network = Network(run, inputs, batch, 1 if thorough else math.isqrt(batch.samples))
    failed = None if possible else f"no input runs over the {samples} samples along its first axis"
    reason = f"{failed}: they are not taken apart" if failed else run.varying
    found = None
    if not reason:
        found, reason = first_that_runs([lambda: compare(network)], FATAL)
    differences, missing = found or (None, {})
    tolerance = coupling_tolerance(xp, run.narrow)
    return Comparison(differences, dict(missing), reason, tolerance, batch.expanded)


def _spread(samples: int, few: int) -> list[int]:
    """At most so many of the samples, spread over the batch."""
    few = min(few, samples)
    return sorted({round(i * (samples - 1) / max(few - 1, 1)) for i in range(few)})


@dataclass(frozen=True)
class Look:
    """One sample run alone, at every measurement: another one each time.

    Attributes
    ----------
    apart:
        How far its outputs and the squared norms of its gradient are from those in the batch, relative. Shape ().
    bend:
        How far its backward pass is from linear, where somebody wrote it, or None.
    """

    apart: tf.Tensor
    bend: tf.Tensor | None


def look_at_one(
    samples: Samples, g: tf.Tensor, magnitude: tf.Tensor, flat: tf.Tensor, uses: Uses | None, turn: tf.Tensor
) -> Look:
    """Run a sample alone whose number is drawn from `turn`, and hold it against the batch.

    Parameters
    ----------
    g, magnitude, flat:
        Loss gradient (N, K), divided by this, and outputs (N, K).
    uses:
        What the operations make of the parameters by g; None in micro-batches, where a group of samples with the one in
        it is run for the purpose.
    """
    total = samples.shape[0]
    number = tf.random.stateless_uniform((), tf.stack([turn, total]), 0, total, tf.int32)
    row = tf.gather(g, number[None])
    alone = replace(recorded(samples.run, cut(samples.inputs, number[None], total), 0), taps=(), sites=())
    gradient = alone.pulled(row)[0]
    placed = tf.tensor_scatter_nd_update(flat, number[None, None], tf.cast(flatten(alone.outputs), flat.dtype))
    own = {name: tf.cast(square_norm(part), flat.dtype)[None] for name, part in gradient.items()}
    if uses is None:
        in_batch, outputs = _in_its_group(samples, g, number)
        index = tf.reshape((number + tf.range(outputs.shape[0])) % total, (-1, 1))
        apart = xp.maximum(look(xp, flat, placed), look(xp, flat, tf.tensor_scatter_nd_update(flat, index, outputs)))
    else:
        in_batch, apart = _in_the_batch(samples, g, uses, number), look(xp, flat, placed)
    apart = xp.maximum(apart, look(xp, flat, flat, [(in_batch, own)]))
    bend = _bend(samples.run, alone, row, gradient)
    return Look(apart, bend if bend is None else xp.maximum(bend, _bend_of_largest(samples, g, magnitude)))


def _bend_of_largest(samples: Samples, g: tf.Tensor, magnitude: tf.Tensor) -> tf.Tensor:
    """The bend of the sample with the largest loss gradient, which a backward pass that clips reaches first."""
    number = tf.argmax(tf.reduce_max(tf.abs(g), axis=1), output_type=tf.int32)[None]
    alone = replace(recorded(samples.run, cut(samples.inputs, number, samples.shape[0]), 0), taps=(), sites=())
    return bend_of_loss(xp, _pull_of(alone), tf.gather(g, number), magnitude)


def _in_the_batch(samples: Samples, g: tf.Tensor, uses: Uses, number: tf.Tensor) -> Norms:
    """{parameter: (1,) squared norm of one sample's gradient in the batch}: by rules, or by a pass of its own."""
    assert samples.batch is not None, "the batch has run"
    found = samples.batch.square_norms(samples.batch.of_samples(uses, number[None]), 1)
    if set(found) == set(samples.run.sources):
        return found
    only = tf.where(tf.range(g.shape[0])[:, None] == number, g, tf.zeros_like(g))
    pulled = samples.batch.pulled(only)[0]
    return found | {n: tf.cast(square_norm(part), g.dtype)[None] for n, part in pulled.items() if n not in found}


def _in_its_group(samples: Samples, g: tf.Tensor, number: tf.Tensor) -> tuple[Norms, tf.Tensor]:
    """The same in a micro-batch that begins with the sample, whose outputs come too."""
    total = samples.shape[0]
    size = min(total, max(2, samples.microbatch or total))
    index = (number + tf.range(size)) % total
    inputs, rows = cut(samples.inputs, index, total), tf.gather(g, index)
    batch = recorded(samples.run, inputs, size)
    some = replace(samples, inputs=inputs, shape=tuple(rows.shape), batch=batch, microbatch=None)
    uses = some.uses(batch, batch.pulled(rows, gradient=False)[1])
    return _in_the_batch(some, rows, uses, tf.constant(0)), tf.cast(flatten(batch.outputs), g.dtype)


def _bend(run: Forward, alone: Tapped, row: tf.Tensor, gradient: Gradients) -> tf.Tensor | None:
    """How far J^T v of one sample is from J^T (s v) / s. Shape (). float16 has no digits for such v."""
    if not run.custom_backward or run.narrow == tf.float16:
        return None
    return bend_at(xp, _pull_of(alone), row, _in_one_dtype(gradient, row.dtype), (SMALLER,))


def _pull_of(alone: Tapped) -> Callable[[tf.Tensor], Vector]:
    """v -> J^T v of samples that run alone, in v's dtype."""
    return lambda v: _in_one_dtype(alone.pulled(v)[0], v.dtype)


def _within(tolerance: float, values: list[tf.Tensor]) -> tf.Tensor:
    """Whether all are numbers up to the tolerance. Shape ()."""
    return tf.reduce_all(tf.stack([tf.cast(value, tf.float64) for value in values]) <= tolerance)
