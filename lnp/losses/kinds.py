"""Which loss is meant, and how many terms its mean reduction averages.

The values of the losses are computed by the backends, in their own framework, so that they can be differentiated.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

NAMES = ("cross_entropy", "mse", "binary_cross_entropy", "huber")
ELEMENTWISE = ("binary_cross_entropy", "mse", "huber")
"""Losses that average over all elements: of a logit and its label or probability, or with delta = 1."""
IGNORE_INDEX = -100
"""Class labels of this value (PyTorch's and Hugging Face's convention) take no part in the cross-entropy."""


def resolve(
    loss: str | Callable | None, outputs: Sequence[int], targets: Sequence[int] | None, integer_targets: bool
) -> str | Callable:
    """The loss that the user means: the callable itself, or one of `NAMES`.

    `outputs` and `targets` are shapes. With `loss=None`: cross-entropy for integer targets, mean squared error for
    float targets of the outputs' shape.

    Raises
    ------
    ValueError
        For an unknown name, and where the loss cannot be inferred from the shapes.
    TypeError
        If `loss` is neither a name, a callable nor None.
    """
    if callable(loss):
        return loss
    if isinstance(loss, str):
        if loss not in NAMES:
            raise ValueError(
                f"Unknown loss {loss!r}. Expected one of {', '.join(map(repr, NAMES))}, or a callable "
                "loss(outputs, targets) -> scalar. Pass one of these as loss=."
            )
        return loss
    if loss is not None:
        raise TypeError(
            f"loss is {loss!r} of type {type(loss).__name__}. Expected a name ({', '.join(map(repr, NAMES))}), a "
            "callable loss(outputs, targets) -> scalar, or None to infer it."
        )
    if targets is None:
        raise ValueError(
            "The loss cannot be inferred, or is given by name. Expected outputs and targets of one array each. "
            "Pass loss=, a callable loss(outputs, targets) -> scalar."
        )
    if integer_targets:
        return "cross_entropy"
    if tuple(outputs) == tuple(targets):
        return "mse"
    raise ValueError(
        f"The loss cannot be inferred from float targets of shape {tuple(targets)} and outputs of shape "
        f"{tuple(outputs)}. Expected integer class labels, or float targets of the outputs' shape. Reshape the "
        "targets, or pass loss=."
    )


def class_axis(
    outputs: Sequence[int], targets: Sequence[int], integer_targets: bool, *, second_axis: bool = False
) -> int:
    """The axis of the outputs that runs over classes, for the cross-entropy.

    Labels (integers) have the outputs' shape without the class axis, which is the last one, or with
    `second_axis=True` (PyTorch's convention) the second one where only that fits. Soft and one-hot targets have the
    outputs' shape and their classes on the last axis.

    Raises
    ------
    ValueError
        Where the shapes do not match, and where both axes would fit.
    """
    outputs, targets = tuple(outputs), tuple(targets)
    last = len(outputs) - 1
    if len(outputs) < 2:
        raise ValueError(
            f"The outputs have shape {outputs}, without an axis for classes. Expected (samples, ..., classes) "
            "for the cross-entropy. For one output per sample pass another loss=, such as 'mse' or a callable."
        )
    if not integer_targets:
        if outputs == targets:
            return 1 if second_axis and len(outputs) > 2 else last
        raise ValueError(
            f"Soft targets of shape {targets} do not match outputs of shape {outputs}. Expected class "
            "probabilities of the outputs' shape, or integer labels without the class axis. Reshape the targets."
        )
    fits_last = targets == outputs[:-1]
    fits_second = second_axis and len(outputs) > 2 and targets == outputs[:1] + outputs[2:]
    if fits_last and fits_second:
        raise ValueError(
            f"Outputs of shape {outputs} and labels of shape {targets}: the classes could be on axis 1 or on the "
            "last axis. Expected shapes that fit one of them. "
            "Pass the loss as a callable, for example loss=torch.nn.CrossEntropyLoss() for axis 1."
        )
    if not (fits_last or fits_second):
        raise ValueError(
            f"Labels of shape {targets} do not match outputs of shape {outputs}. Expected shape "
            f"{outputs[:-1]}, one integer for each row of outputs. Reshape the labels or the outputs."
        )
    return last if fits_last else 1


def check_same_shape(outputs: Sequence[int], targets: Sequence[int]) -> None:
    """Raise ValueError unless outputs and targets of an elementwise loss have one shape."""
    if tuple(outputs) != tuple(targets):
        raise ValueError(
            f"Targets of shape {tuple(targets)} do not match outputs of shape {tuple(outputs)}. Expected "
            "equal shapes for this loss, since broadcasting hides mistakes. Reshape the targets."
        )


def label_terms(xp: Any, labels: Any, ignore_index: int = IGNORE_INDEX) -> Any:
    """Number of class labels that are not ignored: the cross-entropy's `loss_terms`. Shape (), stays on its device."""
    return xp.sum(xp.astype(labels != ignore_index, xp.int32))


def labels_out_of_range(xp: Any, labels: Any, classes: int, ignore_index: int = IGNORE_INDEX) -> tuple[Any, str]:
    """Whether a label is neither in [0, classes) nor ignored, as a check for `Linearization.violations`."""
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    return xp.any(wrong), (
        f"The targets hold labels outside [0, {classes}), while the outputs have {classes} classes. Expected "
        f"integers from 0 to {classes - 1}, or {IGNORE_INDEX} for a position to ignore. Check the labels or the "
        "number of outputs."
    )


def stated_terms(loss: Any, outputs: Any, targets: Any) -> tuple[Any, tuple[str, ...]] | None:
    """(`loss_terms`, notes) of a loss that says so itself, by a method `loss_terms(outputs, targets)`; None for others.

    A library's losses are wrapped in such an object where their reduction is known.
    """
    return loss.loss_terms(outputs, targets) if hasattr(loss, "loss_terms") else None


def separable(loss: str | Callable | None) -> bool:
    """Whether a loss is known to be a mean over samples: one of lnp's own, or one with an attribute that says so."""
    return loss is None or isinstance(loss, str) or bool(getattr(loss, "separable", False))


TRIED = 6
"""Samples on which a loss is tried."""


def left_in(samples: int) -> tuple[list[int], ...]:
    """Samples on which a loss is called by itself, to see whether it is a mean: drawn at random, so that no pairs stay
    together by their places; two, whose averages differ much from the batch's, and two thirds.

    >>> [len(some) for some in left_in(9)], [len(some) for some in left_in(2)]
    ([2, 6], [1, 1])
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


def agrees(xp: Any, whole: Any, gradient: Callable[[list[int]], tuple[Any, Any]]) -> bool | None:
    """Whether some samples alone have the loss gradient of a mean; None where it tells nothing.

    `whole` is the loss gradient (N, K); `gradient` takes which samples to (their rows of it, the one among themselves).

    >>> import numpy
    >>> g = numpy.ones((6, 1))
    >>> agrees(numpy, g, lambda some: (g[some], g[some] * 6 / len(some))), agrees(numpy, 0 * g, lambda some: (g, g))
    (True, None)
    """
    if not tells(xp, whole):
        return None
    return all(bool(is_mean(xp, *gradient(some), whole.shape[0])) for some in left_in(whole.shape[0]))


def all_agree(found: Sequence[bool | None]) -> bool:
    """The verdict of several trials; None are those that tell nothing, as of probabilities that are negative.

    >>> all_agree([True, None]), all_agree([None, None]), all_agree([True, False])
    (True, False, False)
    """
    return True in found and False not in found


def assumed_terms(xp: Any, outputs: Sequence[int], targets: Any, integer_targets: bool) -> tuple[Any, str]:
    """`loss_terms` for a loss that lnp does not know, from the targets, and the note that says what was assumed."""
    shape = None if targets is None else tuple(targets.shape)
    if shape is not None and integer_targets and len(shape) < len(outputs):
        return label_terms(xp, targets), _assumed(f"the labels that are not {IGNORE_INDEX}")
    if shape == tuple(outputs):
        return math.prod(shape), _assumed("the elements of the targets")
    return outputs[0], _assumed("the samples")


def _assumed(what: str) -> str:
    return (
        f"loss_terms counts {what}, which is assumed for this loss; pass loss_terms= if its mean is over something else"
    )
