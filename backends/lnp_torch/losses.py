"""Losses in PyTorch, and the number of terms they average."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from array_api_compat import torch as xp
from torch.nn import functional as F

from lnp.contract.trees import leaves
from lnp.losses import kinds
from lnp_torch.complex import continuous
from lnp_torch.known import Known, known

Violations = tuple[tuple[torch.Tensor, str], ...]


OTHERS = "the loss has terms that do not come from the outputs: they are trained on, and left out here"


def other_terms(loss: torch.Tensor, parts: list[torch.Tensor]) -> bool:
    """Whether any parameter is reached from the loss without passing through the outputs."""
    ends, stack, seen = {part.grad_fn for part in parts}, [loss.grad_fn], set()
    own = {id(part) for part in parts if part.grad_fn is None}
    while stack:
        node = stack.pop()
        if node is None or node in ends or node in seen:
            continue
        if hasattr(node, "variable"):  # where a gradient is accumulated
            if id(node.variable) not in own:
                return True
            continue
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)
    return False


def integer(targets: Any) -> bool:
    """Whether the targets are labels."""
    return isinstance(targets, torch.Tensor) and not (
        targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool
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
    violations, notes:
        As in `lnp.Linearization`.
    """

    function: Callable
    terms: Any
    separable: bool
    violations: Violations = ()
    notes: tuple[str, ...] = ()


def prepare(loss: str | Callable | None, outputs: Any, targets: Any, given: int | None) -> Prepared:
    """The loss that the user means. `given` replaces the number of terms, and what would be said about it."""
    prepared = _prepared(loss, outputs, targets)
    return prepared if given is None else replace(prepared, terms=given, notes=())


def _prepared(loss: str | Callable | None, outputs: Any, targets: Any) -> Prepared:
    single = isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor)
    shape = tuple(outputs.shape) if single else ()
    meant = kinds.resolve(loss, shape, tuple(targets.shape) if single else None, integer(targets))
    if isinstance(meant, str) and not single:
        kinds.resolve(None, (), None, False)  # a named loss needs single tensors just as much
    if isinstance(meant, str) and meant in kinds.ELEMENTWISE:
        kinds.check_same_shape(shape, targets.shape)
        return Prepared(ELEMENTWISE[meant], math.prod(shape), separable=True)
    if meant == "cross_entropy":
        axis = kinds.class_axis(shape, targets.shape, integer(targets), second_axis=True)
        terms, violations = _class_terms(shape, axis, targets, kinds.IGNORE_INDEX)
        value = lambda outputs, targets: _cross_entropy(outputs, targets, axis)
        return Prepared(value, terms, True, violations)
    assert callable(meant)
    stated = kinds.stated_terms(meant, outputs, targets)
    if stated is not None:
        return Prepared(meant, stated[0], kinds.separable(meant), notes=stated[1])
    own = known(meant) if single else None
    if own is not None and (own.over != "elements" or shape == tuple(targets.shape)):
        terms, notes = _known_terms(own, shape, targets)
        # A sum is N times a mean over samples, so its position and noise scale would be the mean's; its rate however is
        # that of N times the loss, which says nothing about the population until N is divided out.
        return Prepared(meant, terms, own.reduction in ("mean", "batchmean"), notes=notes)
    # Also where PyTorch broadcasts one to the other: (N, 1) with (N,) pairs every sample with every other one.
    leaf = outputs if isinstance(outputs, torch.Tensor) else _first(outputs)
    terms, note = kinds.assumed_terms(xp, tuple(leaf.shape), targets if single else None, integer(targets))
    return Prepared(meant, terms, kinds.separable(meant), notes=(note,))


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
    return F.cross_entropy(rows, labels.where(inside, kinds.IGNORE_INDEX))


def _class_terms(shape: tuple, axis: int, targets: torch.Tensor, ignore_index: int) -> tuple[Any, Violations]:
    if not integer(targets):
        return math.prod(shape) // shape[axis], ()
    violation = kinds.labels_out_of_range(xp, targets, shape[axis], ignore_index)
    return kinds.label_terms(xp, targets, ignore_index), (violation,)


def _known_terms(own: Known, shape: tuple, targets: torch.Tensor) -> tuple[Any, tuple[str, ...]]:
    """`loss_terms` of one of PyTorch's own losses, and notes."""
    terms: Any = {"elements": math.prod(shape), "samples": shape[0]}.get(own.over)
    if own.over == "labels":
        terms = _label_terms(own, shape, targets)
    if own.reduction == "sum":
        return 1, ("the loss is a sum, which averages over nothing: loss_terms is 1",)
    if own.reduction == "batchmean":
        return shape[0], ()
    if own.weighted and own.over == "labels" and integer(targets):
        return terms, ("the loss is a mean weighted by class: loss_terms counts each label as one",)
    return terms, ()  # other weights scale the terms, and the mean over them stays as it is


def _label_terms(own: Known, shape: tuple, targets: torch.Tensor) -> Any:
    if len(shape) < 2:
        kinds.class_axis(shape, targets.shape, integer(targets))  # says what is wrong
    terms, violations = _class_terms(shape, 1, targets, own.ignore_index)
    for violated, message in violations:
        if bool(violated):  # before the loss is called: on a GPU it would abort the process
            raise ValueError(message)
    return terms


def _first(tree: Any) -> torch.Tensor:
    return next(leaf for leaf in leaves(tree) if continuous(leaf))
