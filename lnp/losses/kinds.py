"""Which loss is meant, and how many terms its mean reduction averages.

The values of the losses are computed by the backends, in their own framework, so that they can be differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lnp.losses.evidence import LossInputs, described

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
        return checked_name(loss)
    if loss is not None:
        raise TypeError(
            f"loss is {loss!r} of type {type(loss).__name__}. Expected a name ({', '.join(map(repr, NAMES))}), a "
            "callable loss(outputs, targets) -> scalar, or None to infer it."
        )
    if targets is None:
        raise ValueError(
            "The loss cannot be inferred, or is given by name. Expected outputs and targets of one array each. "
            "Make the targets an array. Pass loss=, a callable loss(outputs, targets) -> scalar, for other ones."
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


def checked_name(loss: str) -> str:
    """The name of a loss; a ValueError for an unknown one."""
    if loss in NAMES:
        return loss
    known = f"{', '.join(map(repr, NAMES))}, or a callable loss(outputs, targets) -> scalar"
    raise ValueError(f"Unknown loss {loss!r}. Expected one of {known}. Pass one of these as loss=.")


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
            f"{outputs[:-1]}, one integer for each row of outputs. Reshape the labels, or make one-hot ones floats."
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


def sample_label_terms(xp: Any, labels: Any, ignore_index: int = IGNORE_INDEX) -> Any:
    """Number of labels of each sample that are not ignored, shape (N,): `sample_terms` of the cross-entropy."""
    counted = xp.astype(labels != ignore_index, xp.int32)
    return xp.sum(xp.reshape(counted, (labels.shape[0], -1)), axis=1)


def labels_out_of_range(xp: Any, labels: Any, classes: int, ignore_index: int = IGNORE_INDEX) -> tuple[Any, str]:
    """Whether a label is neither in [0, classes) nor ignored, as a check for `Linearization.violations`."""
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    remedy = f"integers from 0 to {classes - 1}, or {IGNORE_INDEX} to ignore one. Check the labels, or the outputs."
    if classes == 1:
        remedy = "one output for each class. For two classes pass loss='binary_cross_entropy' and float targets."
    return xp.any(wrong), (
        f"The targets hold labels outside [0, {classes}), while the outputs have {classes} classes. Expected {remedy}"
    )


def stated_terms(loss: Any, outputs: Any, targets: Any) -> tuple[Any, tuple[str, ...]] | None:
    """(`loss_terms`, notes) of a loss that says so itself, by a method `loss_terms(outputs, targets)`; None for others.

    A library's losses are wrapped in such an object where their reduction is known.
    """
    return loss.loss_terms(outputs, targets) if hasattr(loss, "loss_terms") else None


def stated_sample_terms(loss: Any, outputs: Any, targets: Any) -> Any:
    """What samples weigh in a loss that says so by a method `sample_terms(outputs, targets)`, (N,); None for others."""
    return loss.sample_terms(outputs, targets) if hasattr(loss, "sample_terms") else None


def separable(loss: str | Callable | None) -> bool:
    """Whether a loss is known to be a mean over samples: one of lnp's own, or one with an attribute that says so."""
    return loss is None or isinstance(loss, str) or bool(getattr(loss, "separable", False))


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


@dataclass(frozen=True)
class Prepared:
    """A loss that can be called, and what is known of it.

    Attributes
    ----------
    function:
        (outputs, targets) -> scalar, where outputs may be of any structure.
    terms:
        Number of terms that its mean averages.
    separable:
        Whether it is known to be a mean over samples.
    violations, notes, sample_terms:
        As in `lnp.Linearization`.
    takes, axis:
        What it takes outputs for, and their axis of classes, as far as it is known: see `LossInputs`.
    name, inputs:
        Which loss it is, in words, and what it is given.
    """

    function: Callable
    terms: Any
    separable: bool
    violations: tuple[tuple[Any, str], ...] = ()
    notes: tuple[str, ...] = ()
    sample_terms: Any = None
    takes: str = ""
    axis: int | None = None
    name: str = ""
    inputs: LossInputs | None = None


@dataclass(frozen=True)
class Given:
    """What a loss is given, as far as it decides which loss is meant.

    Attributes
    ----------
    outputs, targets:
        Shapes, where each is one array; else None.
    integer:
        Whether the targets are labels.
    first:
        Shape of the first output.
    """

    outputs: tuple[int, ...] | None
    targets: tuple[int, ...] | None
    integer: bool
    first: tuple[int, ...]

    @property
    def single(self) -> bool:
        """Whether outputs and targets are one array each."""
        return self.outputs is not None and self.targets is not None


def prepare(
    xp: Any,
    loss: str | Callable | None,
    given: Given,
    arrays: tuple[Any, Any],
    *,
    elementwise: Mapping[str, Callable],
    cross_entropy: Callable[[int, bool], Callable],
    known: Callable[[Callable], Prepared | None] = lambda loss: None,
    second_axis: bool = False,
    loss_terms: Any = None,
) -> Prepared:
    """The loss that the user means, in a backend's own framework.

    Parameters
    ----------
    arrays:
        (outputs, targets) of the batch.
    elementwise:
        {name: loss(outputs, targets) -> scalar} for each of `ELEMENTWISE`.
    cross_entropy:
        (axis of the classes, whether the targets are labels) -> that loss.
    known:
        What the framework's own losses average, or None for a loss that is none of them.
    second_axis:
        As for `class_axis`.
    loss_terms:
        The user's own n: it replaces the number of terms, and what would be said about it.

    Raises
    ------
    ValueError, TypeError
        As `resolve`, `class_axis` and `check_same_shape`.
    """
    prepared = _prepared(xp, loss, given, arrays, elementwise, cross_entropy, known, second_axis)
    name, inputs = described(loss, prepared.takes, prepared.axis, arrays, given.single, given.integer)
    prepared = replace(prepared, name=name, inputs=inputs)
    if loss_terms is None:
        return prepared
    weights = prepared.sample_terms
    if weights is not None:  # the user may know better than that the terms are labels
        weights = xp.where(xp.sum(weights) == loss_terms, weights, xp.ones_like(weights))
    return replace(prepared, terms=loss_terms, notes=(), sample_terms=weights)


def _prepared(
    xp: Any, loss: Any, given: Given, arrays: tuple[Any, Any], elementwise: Mapping[str, Callable],
    cross_entropy: Callable, known: Callable, second_axis: bool,
) -> Prepared:  # fmt: skip
    """The loss with its own number of terms, whatever the user says about that."""
    outputs, targets = arrays
    shape = given.outputs or ()
    meant = resolve(loss, shape, given.targets if given.single else None, given.integer)
    if isinstance(meant, str) and not given.single:
        resolve(None, (), None, False)  # a named loss needs single arrays just as much
    if isinstance(meant, str) and meant in ELEMENTWISE:
        check_same_shape(shape, given.targets or ())
        return Prepared(elementwise[meant], math.prod(shape), separable=True, takes=meant)
    if isinstance(meant, str):
        axis = class_axis(shape, given.targets or (), given.integer, second_axis=second_axis)
        terms, violations = class_terms(xp, shape, axis, targets, given.integer)
        weights = sample_label_terms(xp, targets) if given.integer else None
        function = cross_entropy(axis, given.integer)
        return Prepared(function, terms, True, violations, sample_terms=weights, takes=meant, axis=axis)
    stated = stated_terms(meant, outputs, targets)
    if stated is not None:
        weights = stated_sample_terms(meant, outputs, targets)
        return Prepared(meant, stated[0], separable(meant), notes=stated[1], sample_terms=weights)
    own = known(meant)
    if own is not None:
        return own
    terms, note = assumed_terms(xp, given.first, targets if given.single else None, given.integer)
    labels = given.single and given.integer and len(given.targets or ()) < len(given.first)
    weights = sample_label_terms(xp, targets) if labels else None
    return Prepared(meant, terms, separable(meant), notes=(note,), sample_terms=weights)


def class_terms(
    xp: Any, shape: tuple[int, ...], axis: int, targets: Any, integer: bool, ignore_index: int = IGNORE_INDEX
) -> tuple[Any, tuple[tuple[Any, str], ...]]:
    """(`loss_terms` of a cross-entropy, its check of the labels) for outputs with their classes on this axis."""
    if not integer:
        return math.prod(shape) // shape[axis], ()
    violation = labels_out_of_range(xp, targets, shape[axis], ignore_index)
    return label_terms(xp, targets, ignore_index), (violation,)
