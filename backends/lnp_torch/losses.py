"""Losses in PyTorch, and the number of terms they average."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from array_api_compat import torch as xp
from torch.nn import functional as F

from lnp import losses
from lnp.structure import leaves
from lnp_torch.known import Known, known

Violations = tuple[tuple[torch.Tensor, str], ...]


def integer(targets: Any) -> bool:
    """Whether the targets are labels."""
    return isinstance(targets, torch.Tensor) and not (
        targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool
    )


def prepare(
    loss: str | Callable | None, outputs: Any, targets: Any, given: int | None
) -> tuple[Callable, Any, Violations, tuple[str, ...]]:
    """(loss(outputs, targets) -> scalar, loss_terms, violations, notes), where outputs may be of any structure."""
    single = isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor)
    shape = tuple(outputs.shape) if single else ()
    meant = losses.resolve(loss, shape, tuple(targets.shape) if single else None, integer(targets))
    if isinstance(meant, str) and not single:
        losses.resolve(None, (), None, False)  # a named loss needs single tensors just as much
    if isinstance(meant, str) and meant in losses.ELEMENTWISE:
        losses.check_same_shape(shape, targets.shape)
        return ELEMENTWISE[meant], math.prod(shape) if given is None else given, (), ()
    if meant == "cross_entropy":
        axis = losses.class_axis(shape, targets.shape, integer(targets), second_axis=True)
        terms, violations = _class_terms(shape, axis, targets, losses.IGNORE_INDEX)
        value = lambda outputs, targets: _cross_entropy(outputs, targets, axis)
        return value, terms if given is None else given, violations, ()
    assert callable(meant)
    stated = losses.stated_terms(meant, outputs, targets)
    if stated is not None:
        return meant, stated[0] if given is None else given, (), stated[1]
    terms, notes = _known_terms(meant, shape, targets) if single else (None, ())
    if terms is None:
        leaf = outputs if isinstance(outputs, torch.Tensor) else _first(outputs)
        terms, note = losses.assumed_terms(xp, tuple(leaf.shape), targets if single else None, integer(targets))
        notes = (note,)
    return meant, *((terms, (), notes) if given is None else (given, (), ()))


ELEMENTWISE = {
    "mse": lambda outputs, targets: F.mse_loss(outputs, targets.to(outputs.dtype)),
    "huber": lambda outputs, targets: F.huber_loss(outputs, targets.to(outputs.dtype)),
    "binary_cross_entropy": lambda outputs, targets: F.binary_cross_entropy_with_logits(
        outputs, targets.to(outputs.dtype)
    ),
}


def _cross_entropy(outputs: torch.Tensor, targets: torch.Tensor, axis: int) -> torch.Tensor:
    """The mean over labels that are not ignored; labels out of range are ignored here, and reported as violations."""
    rows = outputs.movedim(axis, -1).flatten(0, -2)
    if not integer(targets):
        return F.cross_entropy(rows, targets.movedim(axis, -1).flatten(0, -2).to(rows.dtype))
    labels = targets.flatten().long()
    inside = (labels >= 0) & (labels < rows.shape[-1])
    return F.cross_entropy(rows, labels.where(inside, losses.IGNORE_INDEX))


def _class_terms(shape: tuple, axis: int, targets: torch.Tensor, ignore_index: int) -> tuple[Any, Violations]:
    if not integer(targets):
        return math.prod(shape) // shape[axis], ()
    violation = losses.labels_out_of_range(xp, targets, shape[axis], ignore_index)
    return losses.label_terms(xp, targets, ignore_index), (violation,)


def separable(loss: str | Callable | None) -> bool:
    """Whether a loss is known to be a mean over samples.

    A sum is not: the population's rate and position of a sum depend on the number of samples that are summed.
    """
    own = known(loss)
    return losses.separable(loss) if own is None else own.reduction in ("mean", "batchmean")


def _known_terms(loss: Any, shape: tuple, targets: torch.Tensor) -> tuple[Any, tuple[str, ...]]:
    """`loss_terms` of PyTorch's own losses and notes, or None."""
    own = known(loss)
    if own is None:
        return None, ()
    terms = _label_terms(own, shape, targets) if own.labels else math.prod(torch.broadcast_shapes(shape, targets.shape))
    if own.reduction == "sum":
        return 1, ("the loss is a sum, which averages over nothing: loss_terms is 1",)
    if own.reduction == "batchmean":
        return shape[0], ()
    return terms, ("the loss weights its terms by class: loss_terms counts them as equal",) if own.weighted else ()


def _label_terms(own: Known, shape: tuple, targets: torch.Tensor) -> Any:
    if len(shape) < 2:
        losses.class_axis(shape, targets.shape, integer(targets))  # says what is wrong
    terms, violations = _class_terms(shape, 1, targets, own.ignore_index)
    for violated, message in violations:
        if bool(violated):  # before the loss is called: on a GPU it would abort the process
            raise ValueError(message)
    return terms


def _first(tree: Any) -> torch.Tensor:
    return next(leaf for leaf in leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
