"""How PyTorch's losses reduce: what their mean averages over, and how many terms that are."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from array_api_compat import torch as xp
from torch import nn
from torch.nn import functional as F

from lnp.losses import kinds


def integer(targets: Any) -> bool:
    """Whether the targets are labels."""
    return isinstance(targets, torch.Tensor) and not (
        targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool
    )


ELEMENTS = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss),
    *(nn.SoftMarginLoss, nn.KLDivLoss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy),
    *(F.binary_cross_entropy_with_logits, F.poisson_nll_loss, F.soft_margin_loss, F.kl_div),
    F.gaussian_nll_loss,  # with its variance bound by functools.partial; the module takes it in every call
)
"""Losses whose mean is over all elements of outputs and targets."""
LABELS = (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss)
"""Losses whose mean is over class labels."""
TAKES = {
    "cross_entropy": (nn.CrossEntropyLoss, F.cross_entropy),
    "log_probabilities": (nn.NLLLoss, F.nll_loss),
    "binary_cross_entropy": (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits),
}
"""What losses take outputs for, where that may be mistaken."""
SAMPLES = (nn.MultiMarginLoss, nn.MultiLabelMarginLoss, F.multi_margin_loss, F.multilabel_margin_loss)
"""Losses whose mean is over samples, however many classes they have."""


@dataclass(frozen=True)
class OwnLoss:
    """How one of PyTorch's losses reduces.

    Attributes
    ----------
    over:
        What its mean averages over.
    reduction:
        "mean", "sum", "none" or "batchmean".
    ignore_index:
        Label that takes no part.
    weighted:
        Whether weights are given, for classes or elements.
    takes:
        What it takes outputs for (`lnp.losses.evidence.LossInputs`), or "".
    """

    over: Literal["elements", "labels", "samples"]
    reduction: str
    ignore_index: int
    weighted: bool
    takes: str = ""


def own_loss(loss: Callable) -> OwnLoss | None:
    """How a loss of PyTorch's reduces: a module, a function, or either with keywords bound by `functools.partial`."""
    identity: Any = loss
    settings: dict[str, Any] = {}
    if isinstance(identity, functools.partial):
        settings = identity.keywords
        identity = None if identity.args else identity.func
    if isinstance(identity, nn.Module):
        # by its exact type: a subclass may compute something else
        identity, settings = type(identity), {**vars(identity), **identity._buffers, **settings}
    over = next((name for name, losses in REDUCED.items() if any(identity is one for one in losses)), None)
    if over is None or {"size_average", "reduce"} & settings.keys():  # the old way to say how a function reduces
        return None
    ignored = settings.get("ignore_index", kinds.IGNORE_INDEX)
    takes = next((name for name, losses in TAKES.items() if any(identity is one for one in losses)), "")
    return OwnLoss(over, settings.get("reduction", "mean"), ignored, settings.get("weight") is not None, takes)


REDUCED: dict[Literal["elements", "labels", "samples"], tuple] = {
    "elements": ELEMENTS,
    "labels": LABELS,
    "samples": SAMPLES,
}


WEIGHTED = "the loss is a mean weighted by class: loss_terms counts each label as one"


@dataclass(frozen=True)
class Reduced:
    """What one call made of many numbers: their sum, divided by something.

    Attributes
    ----------
    added:
        How many numbers were added.
    divisor:
        By what their sum was divided: n of a mean, 1 of a sum.
    notes:
        What is to be said of it.
    labels:
        What each label weighs in their mean, in the labels' shape: 0 if it is ignored, else 1 or its class's weight.
        None for what is no mean over labels.
    """

    added: Any
    divisor: Any
    notes: tuple[str, ...] = ()
    labels: torch.Tensor | None = None

    @property
    def is_mean(self) -> bool:
        """Whether it is known to be a mean without a look at values."""
        plain = isinstance(self.added, int) and isinstance(self.divisor, int)
        return self.divisor is self.added or (plain and self.divisor == self.added)


def reduced(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Reduced | None:
    """How a call of one of PyTorch's loss functions reduces; None for other functions, and where it does not reduce."""
    if func not in LOSSES:
        return None
    given = {name: value for name, value in _bound(func, args, kwargs).items() if value is not None}
    own = own_loss(functools.partial(func, **given))
    reduction = given.get("reduction", "mean")
    if reduction not in ("mean", "sum", "batchmean") or {"size_average", "reduce"} & given.keys():
        return None
    if own is None:
        with torch.no_grad():
            numbers = func(**{**given, "reduction": "none"}).numel()
        return Reduced(numbers, numbers if reduction == "mean" else 1)
    input, target = given["input"], given["target"]
    terms = len(input) if reduction == "batchmean" else _counted(own, input, target)
    weighted = own.weighted and own.over == "labels" and integer(target)
    notes = (WEIGHTED,) if weighted and reduction == "mean" else ()
    labels = None
    if own.over == "labels" and integer(target):
        # a sum is divided by something of the user's own, which is compared with the number of labels
        labels = _label_weights(target.detach(), own.ignore_index, given.get("weight") if reduction == "mean" else None)
    return Reduced(terms, 1 if reduction == "sum" else terms, notes, labels)


def _label_weights(labels: torch.Tensor, ignored: int, weight: torch.Tensor | None) -> torch.Tensor:
    """What each label weighs in PyTorch's mean over labels, in their shape."""
    kept = labels != ignored
    if weight is None:
        return kept
    weight = weight.detach()
    return torch.where(kept, weight[labels.clamp(0, len(weight) - 1).long()], torch.zeros_like(weight[:1]))


def _bound(func: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(inspect.signature(func).bind(*args, **kwargs).arguments)


LOSSES = frozenset(
    {
        *(f for losses in REDUCED.values() for f in losses if not isinstance(f, type)),
        *(F.ctc_loss, F.margin_ranking_loss, F.hinge_embedding_loss, F.multilabel_soft_margin_loss),
        *(F.cosine_embedding_loss, F.triplet_margin_loss, F.triplet_margin_with_distance_loss),
    }
)
"""PyTorch's loss functions."""


def _counted(own: OwnLoss, input: torch.Tensor, target: torch.Tensor) -> Any:
    """The terms of one of PyTorch's losses."""
    if own.over == "elements":
        return math.prod(torch.broadcast_shapes(input.shape, target.shape))
    if own.over == "samples":
        return len(input) if input.ndim > 1 else 1
    if integer(target):
        return kinds.label_terms(xp, target, own.ignore_index)
    return input.numel() // input.shape[1] if input.ndim > 1 else 1


def check_labels(own: OwnLoss, shape: tuple[int, ...], targets: torch.Tensor) -> None:
    """Raise ValueError for labels out of range: on a GPU they abort the process."""
    if len(shape) < 2:
        kinds.class_axis(shape, targets.shape, integer(targets))  # says what is wrong
    _, violations = kinds.class_terms(xp, shape, 1, targets, integer(targets), own.ignore_index)
    for violated, message in violations:
        if bool(violated):
            raise ValueError(message)
