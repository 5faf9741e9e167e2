"""Whether a loss of the user's own is a mean over samples: found out by leaving samples out, on stand-ins.

Only the shapes and dtypes of a batch's outputs and targets count, so that the answer holds for every batch of these
shapes, and can be had while the batch's own values are not known yet: while tracing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lnp.contract.linearization import device_of

TRIED = 6
"""Samples on which a loss is tried."""


def left_in(samples: int) -> tuple[list[int], ...]:
    """Samples on which a loss is called by itself, to see whether it is a mean: drawn at random, so that no pairs stay
    together by their places; two, whose averages differ much from the batch's, and two thirds.

    >>> [[len(some) for some in left_in(samples)] for samples in (9, 4, 2)]
    [[2, 6], [2, 2], [1, 1]]
    """
    order = random.Random(0).sample(range(samples), samples)
    return tuple(sorted(order[:size]) for size in (max(1, min(2, samples // 2)), max(1, 2 * samples // 3)))


TOLERANCE = 1e-3
"""Relative difference of loss gradients that are taken for the same; a loss may cast to float16 inside."""


def is_mean(xp: Any, whole: Any, alone: Any, samples: int) -> Any:
    """Whether a loss behaves as a mean over samples: M g'_m = N g_m for the M samples that are left in, with the loss
    gradients g (M, K) in a batch of N `samples` and g' (M, K) among themselves. An array of shape ().

    >>> import numpy
    >>> mean = lambda f: 2 * f / len(f)  # the gradient of mean_n f_n^2
    >>> f = numpy.ones((4, 1))
    >>> bool(is_mean(numpy, mean(f)[:3], mean(f[:3]), 4)), bool(is_mean(numpy, 2 * f[:3], 2 * f[:3], 4))
    (True, False)
    >>> bool(is_mean(numpy, mean(f[:1]), mean(f[:1]), 1))  # one sample tells nothing
    False
    """
    difference, expected = alone.shape[0] * alone - samples * whole, samples * whole
    agrees = xp.sum(difference * difference) <= TOLERANCE**2 * xp.sum(expected * expected)
    return (alone.shape[0] < samples) & agrees


def tells(xp: Any, gradient: Any) -> Any:
    """Whether a loss gradient tells anything about the loss: it is finite and not zero. An array of shape ()."""
    size = xp.sum(gradient * gradient)
    return (size > 0) & (size < float("inf"))


DRAWS = 2
"""How many times a loss is tried: on outputs between 0 and 1, as probabilities are, and on some of either sign."""
LossGradient = Callable[[list[np.ndarray], list[np.ndarray]], Any]
"""(leaves of the outputs, leaves of the targets) -> the loss gradient (M, K) in the measured outputs."""


@dataclass(frozen=True)
class Leaf:
    """An array of a batch's outputs or targets.

    Attributes
    ----------
    shape, dtype:
        As NumPy has them; float32 for what NumPy does not know.
    measured:
        Whether it is one of the outputs that the loss is differentiated by.
    """

    shape: tuple[int, ...]
    dtype: str
    measured: bool = False


def found_mean(
    xp: Any,
    gradient: LossGradient,
    outputs: Sequence[Leaf],
    targets: Sequence[Leaf],
    fatal: tuple[type[BaseException], ...] = (),
) -> bool:
    """Whether the loss gradient of M samples alone is that among N, times N / M.

    A loss that cannot be called with a part of a batch, or by itself while its caller is traced, is no mean, whatever
    it raises, but for errors that are `fatal`.

    >>> import numpy
    >>> mean = lambda f, y: 2 * (f[0] - y[0]) / f[0].size
    >>> first = lambda f, y: 2 * (f[0] - y[0][:1]) / f[0].size  # compares all samples with the first one's target
    >>> leaves = [Leaf((8, 3), "float64", measured=True)], [Leaf((8, 3), "float64")]
    >>> found_mean(numpy, mean, *leaves), found_mean(numpy, first, *leaves)
    (True, False)
    """
    samples = next(leaf.shape[0] for leaf in outputs if leaf.measured)
    if any(leaf.shape and leaf.shape[0] != samples for leaf in (*outputs, *targets)):
        return False
    try:
        return all_agree([_agrees(xp, gradient, _stand_ins(outputs, targets, draw)) for draw in range(DRAWS)])
    except fatal:
        raise
    except Exception:
        return False


def _agrees(xp: Any, gradient: LossGradient, drawn: tuple[list[np.ndarray], list[np.ndarray]]) -> bool | None:
    """Whether some samples alone have the loss gradient of a mean; None where it tells nothing."""
    whole = gradient(*drawn)
    if not tells(xp, whole):
        return None
    for some in left_in(whole.shape[0]):
        rows = [[array[some] if array.ndim else array for array in arrays] for arrays in drawn]
        in_batch = xp.take(whole, xp.asarray(some, dtype=xp.int32, device=device_of(whole)), axis=0)
        if not is_mean(xp, in_batch, gradient(*rows), whole.shape[0]):
            return False
    return True


def _stand_ins(
    outputs: Sequence[Leaf], targets: Sequence[Leaf], draw: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Random outputs and targets of a few samples."""
    axes = [size for leaf in outputs if leaf.measured for size in leaf.shape[1:]]
    classes = min(axes, default=1)
    made = [_output(leaf, draw) if leaf.measured else _target(leaf, classes, draw) for leaf in outputs]
    return made, [_target(leaf, classes, draw) for leaf in targets]


def _output(leaf: Leaf, draw: int) -> np.ndarray:
    """Between 0 and 1, as probabilities are, or of either sign."""
    generator = np.random.default_rng((1, draw))
    made = generator.uniform(0.1, 0.9, _few(leaf)) if draw == 0 else generator.normal(0, 3, _few(leaf))
    return made.astype(leaf.dtype)


def _target(leaf: Leaf, classes: int, draw: int) -> np.ndarray:
    """Labels below `classes` for integers, else numbers between 0 and 1."""
    generator = np.random.default_rng((2, draw))
    kind = np.dtype(leaf.dtype).kind
    if kind in "iu":
        return generator.integers(0, classes, _few(leaf)).astype(leaf.dtype)
    made = generator.uniform(0.1, 0.9, _few(leaf))
    return made > 0.5 if kind == "b" else made.astype(leaf.dtype)


def _few(leaf: Leaf) -> tuple[int, ...]:
    return (min(leaf.shape[0], TRIED), *leaf.shape[1:]) if leaf.shape else ()


def all_agree(found: Sequence[bool | None]) -> bool:
    """The verdict of several trials; None are those that tell nothing, as of probabilities that are negative.

    >>> all_agree([True, None]), all_agree([None, None]), all_agree([True, False])
    (True, False, False)
    """
    return True in found and False not in found
