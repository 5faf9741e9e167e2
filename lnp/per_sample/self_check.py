r"""Whether the samples of a network may be taken apart, and whether the rules for its operations tell the truth.

Everything that is measured sample by sample rests on two assumptions: the outputs of a sample, and its gradient, are
the same alone as in the batch; and the squared norms that the rules for the operations give are those of the sample's
gradient. Both are looked at, not assumed, in two ways:

    compare   once for each model and shapes: all samples of the batch are run one by one, and their outputs are held
              against the batch's; of a few also the sum of their gradients, and each one's squared norms. Twice: at the
              parameters as they are, and at others, where no gate is closed by chance (`moved`).
    look      at every measurement: whatever ran apart from the batch is held against the batch's rows. What happens
              first at a later step shows then.

A backend supplies operations, the core decides. Pure, safe to trace and compile; `Verdict`s need numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lnp.contract.linearization import Array, Vector, accumulation_dtype, device_of, unit
from lnp.per_sample.differences import (
    SquareNorms,
    finite,
    gradients_apart,
    irregular,
    largest,
    outputs_apart,
    rows_at,
    square_norms_apart,
    widened,
)
from lnp.per_sample.verdict import NOT_FINITE, Verdict, failing, interacting

COMPARED = 8
"""Samples that are compared, spread over the batch."""
BESIDE = 17
"""Samples among which they are compared at other parameters: a number that no layer is likely to have as its size."""
SMALLER = 2.0**-10
"""How much shorter cotangents are pulled back too, to see whether the backward pass is linear: loss gradients of a mean
over many terms are that much shorter than the signs of a probe."""


@dataclass(frozen=True)
class Pulled:
    """What one backward pass of the batch says of a cotangent v.

    Attributes
    ----------
    gradient:
        J^T v, or what `lnp.per_sample.differences.sketched` makes of it, here and in `Alone`.
    square_norms:
        {parameter name: (N,) array of ||J_nl^T v_n||^2} of the parameters whose operations all have rules.
    missing:
        {name of any other parameter: why}.
    """

    gradient: Vector
    square_norms: SquareNorms
    missing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Alone:
    """What C samples say of their cotangents, each run by itself.

    Attributes
    ----------
    outputs:
        (C, K).
    gradient:
        The sum of J_c^T v_c.
    square_norms:
        {parameter name: (C,) array of ||J_cl^T v_c||^2}.
    """

    outputs: Array
    gradient: Vector
    square_norms: SquareNorms


class BatchOperations(Protocol):
    """A network on a batch, as a backend runs it.

    Attributes
    ----------
    xp:
        Array-API namespace.
    outputs:
        (N, K), those of the batch's own function.
    custom_backward:
        Whether anything in it has a backward pass that somebody wrote by hand.
    """

    xp: Any
    outputs: Array
    custom_backward: bool

    def pull(self, v: Array) -> Pulled:
        """One backward pass of the whole batch."""


class Operations(BatchOperations, Protocol):
    """The same, where single samples can be run as well."""

    def alone(self, index: Sequence[int], v: Array) -> Alone:
        """Some samples, one by one, with their rows (C, K) of the cotangent."""

    def outputs_alone(self) -> Array:
        """(N, K) outputs of all samples, each run by itself. A forward pass: of few samples that meet, a few that are
        compared need not be one.
        """


@dataclass(frozen=True)
class Differences:
    """How far what was compared is apart: relative differences, arrays of shape () or numbers. nan for no numbers.

    Attributes
    ----------
    outputs:
        Of single samples' outputs from the batch's.
    gradient:
        Of the sum of single samples' gradients from J^T v.
    rules:
        {parameter name: of its squared norms by rules from those of single samples}, and of what arrives at samples
        whose cotangent is zero.
    bend:
        Of J^T v from J^T (s v) / s.
    batch:
        0 where the batch's own outputs and gradient are finite, else nan.
    """

    outputs: Any
    gradient: Any
    rules: Mapping[str, Any]
    bend: Any
    batch: Any

    def verdict(self, tolerance: float, missing: Mapping[str, str]) -> Verdict:
        """What follows, once they are numbers. `missing` are the parameters without rules, and why."""
        if math.isnan(self.batch):
            return Verdict(sure=False)
        if self.bend > tolerance:
            return Verdict(bent=True)
        if math.isnan(self.outputs) or math.isnan(self.gradient):
            return Verdict(reason=NOT_FINITE)
        if self.outputs > tolerance or self.gradient > tolerance:
            return Verdict(reason=interacting(max(self.outputs, self.gradient)))
        wrong = [name for name, value in self.rules.items() if not value <= 2 * tolerance]  # nan is wrong, too
        general = {**missing, **dict.fromkeys(wrong, "its rules differ from single samples")}
        return Verdict(general=tuple(general.items()))

    def exceed(self, xp: Any, tolerance: float) -> Array:
        """Whether any of them is above the tolerance, shape (): inside compiled code, where no verdict is reached."""
        rules = [0.5 * value for value in self.rules.values()]
        return largest(xp, [self.outputs, self.gradient, self.bend, *rules]) > tolerance


def compared_samples(samples: int, count: int = COMPARED) -> list[int]:
    """Which samples are compared: at most `count`, spread over the batch, and never all of a batch of several, for
    samples that are all there do not show what happens when others are left out.

    >>> compared_samples(64), compared_samples(3), compared_samples(1)
    ([0, 9, 18, 27, 36, 45, 54, 63], [0], [0])
    """
    few = max(1, min(count, samples // 2))
    return sorted({round(i * (samples - 1) / max(few - 1, 1)) for i in range(few)})


def compare(operations: Operations) -> tuple[Differences, Mapping[str, str]]:
    """Hold a few samples of the batch against themselves run one by one; and the parameters without rules, and why.

    The cotangent is zero on all other samples: what they contribute to the gradient, or receive, shows. On those that
    are compared it is random signs times lengths that differ: signs alone would give the biases of all samples the same
    norm, whichever sample they belong to.
    """
    xp, outputs = operations.xp, operations.outputs
    of_every = outputs_apart(xp, operations.outputs_alone(), outputs)  # before the cotangent, which is as large
    index = compared_samples(outputs.shape[0])
    some = cotangents(xp, outputs, len(index))
    v = _placed(xp, some, index, outputs)
    pulled = operations.pull(v)
    alone = operations.alone(index, some)
    of_outputs = xp.maximum(outputs_apart(xp, alone.outputs, rows_at(xp, outputs, index)), of_every)
    of_gradient = largest(xp, list(gradients_apart(xp, alone.gradient, pulled.gradient).values()))
    rules = square_norms_apart(xp, pulled.square_norms, alone.square_norms, index)
    bend, batch = _bend(operations, v, pulled.gradient), finite(xp, [outputs, *pulled.gradient.values()])
    return Differences(of_outputs, of_gradient, rules, bend, batch), pulled.missing


def look(xp: Any, outputs: Array, alone: Array, norms: Sequence[tuple[SquareNorms, SquareNorms]] = ()) -> Array:
    """How far samples that ran apart from the batch are from their rows in it, relative. Shape ().

    Parameters
    ----------
    outputs, alone:
        (M, K) outputs in the batch and apart from it.
    norms:
        Pairs of squared norms of the same samples' gradients, {parameter name: (M,)}, in the batch and apart from it.
    """
    found = outputs_apart(xp, alone, outputs)
    for in_batch, apart in norms:
        differing = square_norms_apart(xp, in_batch, apart, None)
        for value in differing.values():
            found = xp.maximum(found, 0.5 * value)
    return found


def moved(xp: Any, parameters: Vector) -> Vector:
    """Other parameters, see `moved_parameter`."""
    return {name: moved_parameter(xp, p, number) for number, (name, p) in enumerate(parameters.items())}


def moved_parameter(xp: Any, p: Array, number: int) -> Array:
    """A parameter with an irregular number of a tenth of its entries' size, and a tenth, added to each entry."""
    wide = xp.astype(p, accumulation_dtype(xp, p.dtype), copy=False)
    moved = moved_entries(xp, xp.reshape(wide, (-1,)), xp.mean(wide * wide), number)
    return xp.astype(xp.reshape(moved, p.shape), p.dtype)


def moved_entries(xp: Any, entries: Array, mean_square: Array, number: int, start: int = 0) -> Array:
    """Entries (n,) of a parameter, those from `start` on, with what `moved_parameter` adds to them."""
    size = 0.1 * xp.sqrt(mean_square) + 0.1
    return entries + size * irregular(xp, entries.shape[0], number, entries, start)


def cotangents(xp: Any, like: Array, count: int) -> Array:
    """(C, K) numbers of irregular signs and sizes, in eighths from 1 to 2, times lengths of samples from 0.5 on.

    Of signs alone, sums over few positions are small integers, which agree by chance for samples that were mixed up.
    Eighths are exact in every floating-point format. Sizes come from integers: a compiler that makes them in two places
    would round a sine in two ways.
    """
    noise = irregular(xp, count * like.shape[1], 0, like)
    place = xp.arange(count * like.shape[1], device=device_of(like)) % 101
    sizes = (8 + xp.astype(place * (7 * place + 13) % 101 % 8, noise.dtype)) / 8
    signed = xp.reshape(xp.where(noise < 0, -sizes, sizes), (count, -1))
    lengths = xp.asarray([[0.5 + n / 8] for n in range(count)], dtype=signed.dtype, device=device_of(like))
    return xp.astype(signed * lengths, like.dtype)


def first_that_runs(ways: Sequence[Callable[[], Any]], fatal: tuple[type[BaseException], ...]) -> tuple[Any, str]:
    """What the first of these returns that raises no error, and ""; or None, and why the last one failed.

    Whatever a user's network raises for a part of its batch is no reason to fail, but for errors that are `fatal`.
    """
    reason = ""
    for way in ways:
        try:
            return way(), ""
        except fatal:
            raise
        except Exception as error:
            reason = failing(error)
    return None, reason


def bend_of_batch(operations: BatchOperations, g: Array | None = None) -> Array:
    """How far the backward pass of a whole batch is from linear, where its samples cannot be compared: for random signs
    and, where it is given, for the loss gradient g (N, K). Shape ().
    """
    xp, outputs = operations.xp, operations.outputs
    noise = irregular(xp, math.prod(outputs.shape), 0, outputs)
    signs = xp.where(noise < 0, -xp.ones_like(noise), xp.ones_like(noise))
    v = xp.astype(xp.reshape(signs, outputs.shape), outputs.dtype)
    found = _bend(operations, v, operations.pull(v).gradient)
    if g is None:
        return found
    of_loss = bend_of_loss(xp, lambda v: operations.pull(v).gradient, *unit(xp, g))
    return xp.maximum(found, xp.astype(of_loss, found.dtype))


def bend_of_loss(xp: Any, pull: Callable[[Array], Vector], u: Array, magnitude: Array) -> Array:
    """How far J^T is from linear at a loss gradient g = m u, of all samples or of one. Shape ().

    What is measured comes of u, whose entries are at most 1; training pulls back g itself, which one sample far from
    its target makes as long as can be. The rows (M, K) of u are pulled back as they are, shorter, and about as long as
    in training: by a power of two, which rounds nothing.
    """
    power = xp.clip(xp.floor(xp.log2(magnitude)), -30, 100)  # float32 needs room around it
    return bend_at(xp, pull, u, pull(u), (SMALLER, 2.0**power))


def bend_at(
    xp: Any, pull: Callable[[Array], Vector], v: Array, gradient: Vector, scales: Sequence[float | Array]
) -> Array:
    """How far the gradient J^T v is from J^T (s v) / s, the largest of some scales s. Shape ()."""
    found = [xp.zeros((), dtype=accumulation_dtype(xp, v.dtype), device=device_of(v))]
    for scale in scales:
        again = {name: widened(xp, part) / scale for name, part in pull(v * scale).items()}
        found += [xp.astype(value, found[0].dtype) for value in gradients_apart(xp, again, gradient).values()]
    return largest(xp, found)


def _bend(operations: BatchOperations, v: Array, gradient: Vector) -> Array:
    """How far the backward pass is from linear, where somebody wrote it: J^T (s v) / s for shorter and longer v."""
    samples = operations.outputs.shape[0]
    longer = 2.0 ** math.ceil(math.log2(2 * math.sqrt(samples / len(compared_samples(samples)))))
    scales = (SMALLER, longer) if operations.custom_backward else ()
    return bend_at(operations.xp, lambda v: operations.pull(v).gradient, v, gradient, scales)


def _placed(xp: Any, some: Array, index: Sequence[int], outputs: Array) -> Array:
    """(N, K) of the rows (C, K) at their places, zero elsewhere."""
    zeros = xp.zeros((1, some.shape[1]), dtype=some.dtype, device=device_of(some))
    place = {sample: slot for slot, sample in enumerate(index)}
    return rows_at(xp, xp.concat([some, zeros], axis=0), [place.get(n, len(index)) for n in range(outputs.shape[0])])
