"""How far what was computed in two ways is apart: relative differences of outputs, gradients and squared norms.

Pure, on array-API arrays, safe to trace and compile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lnp.contract.linearization import Array, Vector, accumulation_dtype, device_of

SHARE = 0.03
"""A parameter whose gradient is rounding noise beside the others' (a key's bias) is compared with this share of all."""
SKETCH, PIECE, WHOLE = 2**12, 2**15, 2**13
"""Sums that stand for an array, numbers that are added at a time, and how many are left as they are."""
TURN = 1237
"""Places by which the sums of each piece are turned further: no divisor of a layer's width."""
SquareNorms = Mapping[str, Array]
"""{parameter name: array of squared norms, one for each sample}."""


def irregular(xp: Any, count: int, number: int, like: Array, start: int = 0) -> Array:
    """Numbers in [-1, 1] without a pattern that a network could share; drawing random ones takes long to compile.

    Of a long sequence those from `start` on.
    """
    n = xp.astype(start + xp.arange(count, device=device_of(like)), accumulation_dtype(xp, like.dtype))
    return xp.sin(78.233 * (n + 1.0) + 12.9898 * (n - 97.0 * xp.floor(n / 97.0)) * (number + 1.0))


def sketch_size(count: int) -> int:
    """How many numbers stand for so many."""
    return count if count <= WHOLE else SKETCH


def sketched(xp: Any, array: Array, number: int) -> Array:
    """Some thousand sums S a of the entries of an array, with irregular signs; all entries where they are few.

    S is linear, and the same for all arrays of a shape and number, so that ||S a - S b|| stands for ||a - b||, up to
    about sqrt(1/SKETCH): what was summed in two ways is compared without holding either. Shape (SKETCH,), or less.

    Source: Charikar, Chen, Farach-Colton, "Finding frequent items in data streams", doi:10.1016/S0304-3975(03)00400-6.
    """
    flat, count = xp.reshape(widened(xp, array), (-1,)), math.prod(array.shape)
    if sketch_size(count) == count:
        return flat
    size = min(PIECE, -(-count // SKETCH) * SKETCH)
    noise = 43758.5453 * irregular(xp, size, number, flat)  # whose later digits are as good as random
    signs = xp.where(noise - xp.floor(noise) < 0.5, -xp.ones_like(noise), xp.ones_like(noise))
    total = xp.zeros((SKETCH,), dtype=flat.dtype, device=device_of(flat))
    for turn, start in enumerate(range(0, count, size)):
        piece = flat[start : start + size]
        if piece.shape[0] < size:
            piece = xp.concat([piece, xp.zeros((size - piece.shape[0],), dtype=flat.dtype, device=device_of(flat))])
        sums = xp.sum(xp.reshape(piece * signs, (-1, SKETCH)), axis=0)
        total = total + xp.roll(sums, (turn * TURN) % SKETCH)  # no two pieces meet in the same way
    return total


def outputs_apart(xp: Any, alone: Array, outputs: Array) -> Array:
    """The largest difference of outputs, relative to the largest of the batch's. Shape ()."""
    if tuple(alone.shape) != tuple(outputs.shape):
        return xp.asarray(float("inf"), dtype=accumulation_dtype(xp, outputs.dtype), device=device_of(outputs))
    alone, outputs = widened(xp, alone), widened(xp, outputs)
    return xp.max(xp.abs(alone - outputs)) / positive(xp, xp.max(xp.abs(outputs)))


def frozen_agrees(xp: Any, frozen: Array, original: Array, tolerance: float) -> Array:
    """Whether a function whose batch statistics are held fixed computes what the network itself computes. Shape ().

    Only the outputs (N, K) have to agree, up to `coupling_tolerance`: that its Jacobian is another one is what holding
    statistics fixed means. Outputs that are not finite agree with nothing. Where it does not, a backend measures the
    network as it is, jointly where samples interact, with the note `FROZEN_DIFFERS`.
    """
    return outputs_apart(xp, frozen, original) <= tolerance


def gradients_apart(xp: Any, one: Vector, other: Vector) -> dict[str, Array]:
    """{parameter name: ||a - b|| / ||b||}, where all of b counts a little. Each of shape ()."""
    norms = {name: norm(xp, array) for name, array in other.items()}
    floor = SHARE * norm(xp, xp.stack(list(norms.values())))
    return {
        name: norm(xp, widened(xp, one[name]) - widened(xp, other[name])) / positive(xp, norms[name] + floor)
        for name in norms
    }


def sums_apart(xp: Any, alone: Vector, in_batch: Vector, square_norms: SquareNorms) -> Array:
    """How far sums of single samples' gradients are from the batch's gradient, the largest of some parameters. ().

    Relative to what the sum would be if all samples' gradients pointed the same way, sqrt(N sum_n ||G_n||^2): where
    they cancel, as at the end of a training, what is left is rounding. All parameters count a little.

    Parameters
    ----------
    alone:
        {name: sum_n J_n^T g_n} of some parameters.
    in_batch:
        {name: J^T g} of these, or of all.
    square_norms:
        {name: (N,) array of ||J_nl^T g_n||^2} of all.
    """
    wide = {name: widened(xp, norms) for name, norms in square_norms.items()}
    sizes = {name: xp.sqrt(norms.shape[0] * xp.sum(norms)) for name, norms in wide.items()}
    floor = SHARE * norm(xp, xp.stack(list(sizes.values())))
    found = [
        norm(xp, widened(xp, alone[name]) - widened(xp, in_batch[name])) / positive(xp, sizes[name] + floor)
        for name in alone
    ]
    return largest(xp, found)


def square_norms_apart(
    xp: Any, in_batch: SquareNorms, alone: SquareNorms, index: Sequence[int] | None
) -> dict[str, Array]:
    """{parameter name: how far squared norms in the batch, (N,), are from those of some samples alone, (C,)}.

    With an index, of the samples whose cotangent is not zero, also what arrives at all others. Each of shape ().
    """
    if not in_batch:
        return {}
    total = sum((widened(xp, alone[name]) for name in list(alone)[1:]), start=widened(xp, alone[next(iter(alone))]))
    found = {}
    for name, norms in in_batch.items():
        norms, expected = widened(xp, norms), widened(xp, alone[name])
        own = norms if index is None else rows_at(xp, norms, index)
        missed = xp.max(xp.abs(own - expected) / exact_square(xp, expected + SHARE**2 * total))
        if index is not None:
            others = xp.asarray([n not in index for n in range(norms.shape[0])], device=device_of(norms))
            leaked = xp.max(xp.where(others, norms, xp.zeros_like(norms)))
            missed = xp.maximum(missed, leaked / exact_square(xp, xp.max(total)))
        found[name] = missed
    return found


def largest(xp: Any, values: Sequence[Array]) -> Array:
    """The largest of arrays of shape (); nan if one is nan."""
    return xp.max(xp.stack(list(values)))


def finite(xp: Any, arrays: Sequence[Array]) -> Array:
    """0 where all numbers are finite, else nan. Shape ()."""
    return largest(xp, [xp.astype(xp.sum(widened(xp, array) * 0.0), widened(xp, arrays[0]).dtype) for array in arrays])


def rows_at(xp: Any, array: Array, index: Sequence[int]) -> Array:
    """Some rows of an array."""
    return xp.take(array, xp.asarray(list(index), dtype=xp.int32, device=device_of(array)), axis=0)


def norm(xp: Any, array: Array) -> Array:
    """||array|| over all elements, in float32 or better. Shape ()."""
    wide = widened(xp, array)
    return xp.sqrt(xp.sum(wide * wide))


def widened(xp: Any, array: Array) -> Array:
    """The array in float32 or better."""
    return xp.astype(array, accumulation_dtype(xp, array.dtype), copy=False)


def positive(xp: Any, value: Array) -> Array:
    return xp.maximum(value, xp.full_like(value, float(xp.finfo(value.dtype).smallest_normal)))


def exact_square(xp: Any, value: Array) -> Array:
    """At least the smallest square whose digits are there: a sample that a loss has done with has gradients near 0."""
    info = xp.finfo(value.dtype)
    return xp.maximum(value, xp.full_like(value, float(info.smallest_normal) / float(info.eps) ** 2))
