"""Losses in PyTorch: their values, the number of terms that they average, and whether they are means over samples."""

from __future__ import annotations

import functools
import math
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from array_api_compat import torch as xp
from torch import nn
from torch.nn import functional as F

from lnp.contract.trees import leaves, map_leaves
from lnp.losses import kinds, mean_test
from lnp.losses.mean_test import Leaf
from lnp_torch.outputs import Outputs, continuous, flatten, wide

Loss = Callable[[Any, Any], torch.Tensor]
"""(outputs, targets) -> scalar, where both may be of any structure."""

OTHERS = "the loss has terms that do not come from the outputs: they are trained on, and left out here"


def other_terms(loss: torch.Tensor, parts: list[torch.Tensor]) -> bool:
    """Whether any parameter is reached from the loss without passing through the outputs."""
    ends, stack, visited = {part.grad_fn for part in parts}, [loss.grad_fn], set()
    own = {id(part) for part in parts if part.grad_fn is None}
    while stack:
        node = stack.pop()
        if node is None or node in ends or node in visited:
            continue
        if hasattr(node, "variable"):  # where a gradient is accumulated
            if id(node.variable) not in own:
                return True
            continue
        visited.add(node)
        stack.extend(following for following, _ in node.next_functions)
    return False


def integer(targets: Any) -> bool:
    """Whether the targets are labels."""
    return isinstance(targets, torch.Tensor) and not (
        targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool
    )


def prepare(loss: str | Callable | None, outputs: Any, targets: Any, loss_terms: int | None) -> kinds.Prepared:
    """The loss that the user means; `loss_terms` is the user's own n, or None."""
    leaf = outputs if isinstance(outputs, torch.Tensor) else next(leaf for leaf in leaves(outputs) if continuous(leaf))
    given = kinds.Given(_shape(outputs), _shape(targets), integer(targets), tuple(leaf.shape))
    return kinds.prepare(
        xp,
        loss,
        given,
        (outputs, targets),
        elementwise=ELEMENTWISE,
        cross_entropy=lambda axis, labels: functools.partial(_cross_entropy, axis=axis),
        known=lambda loss: _prepared_own(loss, given, targets),
        second_axis=True,
        loss_terms=loss_terms,
    )


def _shape(tree: Any) -> tuple[int, ...] | None:
    return tuple(tree.shape) if isinstance(tree, torch.Tensor) else None


ELEMENTWISE: dict[str, Loss] = {
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


ELEMENTS = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss),
    *(nn.SoftMarginLoss, nn.KLDivLoss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy),
    *(F.binary_cross_entropy_with_logits, F.poisson_nll_loss, F.soft_margin_loss, F.kl_div),
    F.gaussian_nll_loss,  # with its variance bound by functools.partial; the module takes it in every call
)
"""Losses whose mean is over all elements of outputs and targets."""
LABELS = (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss)
"""Losses whose mean is over class labels."""
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
    """

    over: Literal["elements", "labels", "samples"]
    reduction: str
    ignore_index: int
    weighted: bool


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
    return OwnLoss(over, settings.get("reduction", "mean"), ignored, settings.get("weight") is not None)


REDUCED: dict[Literal["elements", "labels", "samples"], tuple] = {
    "elements": ELEMENTS,
    "labels": LABELS,
    "samples": SAMPLES,
}


def _prepared_own(loss: Callable, given: kinds.Given, targets: Any) -> kinds.Prepared | None:
    """One of PyTorch's own losses; None for others, and where it broadcasts: (N, 1) with (N,) pairs all samples."""
    own = own_loss(loss) if given.single else None
    if own is None or (own.over == "elements" and given.outputs != given.targets):
        return None
    terms, notes = _own_terms(own, given.outputs or (), targets)
    # A sum is N times a mean over samples, so its position and noise scale would be the mean's; its rate however is
    # that of N times the loss, which says nothing about the population until N is divided out.
    return kinds.Prepared(loss, terms, own.reduction in ("mean", "batchmean"), notes=notes)


def _own_terms(own: OwnLoss, shape: tuple[int, ...], targets: torch.Tensor) -> tuple[Any, tuple[str, ...]]:
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


def _label_terms(own: OwnLoss, shape: tuple[int, ...], targets: torch.Tensor) -> Any:
    """How many labels take part, shape (). Those out of range raise ValueError: on a GPU they abort the process."""
    if len(shape) < 2:
        kinds.class_axis(shape, targets.shape, integer(targets))  # says what is wrong
    terms, violations = kinds.class_terms(xp, shape, 1, targets, integer(targets), own.ignore_index)
    for violated, message in violations:
        if bool(violated):
            raise ValueError(message)
    return terms


def found_mean(loss: Callable, run: Loss, outputs: Outputs, targets: Any) -> bool:
    """Whether a loss of the user's own is a mean over samples, tried once for each loss, shapes and dtypes.

    `loss` is the user's, by which the answer is remembered; `run` computes it and leaves no trace.
    """
    given, wanted = _described(outputs.tree, of_outputs=True), _described(targets, of_outputs=False)
    answers = _answers(loss)
    if (given, wanted) not in answers:

        def gradient(made: list[np.ndarray], labels: list[np.ndarray]) -> torch.Tensor:
            """(M, K) loss gradient at stand-ins for the outputs and targets."""
            stand_in = Outputs(_filled(outputs.tree, made))
            parts = [part.to(wide([part])).requires_grad_() for part in stand_in.parts]
            with torch.enable_grad():
                value = run(stand_in.with_parts([part.clone() for part in parts]), _filled(targets, labels))
            grads = torch.autograd.grad(value.sum(), parts, allow_unused=True, materialize_grads=True)
            return flatten(list(grads))

        answers[given, wanted] = mean_test.found_mean(xp, gradient, given, wanted, (torch.OutOfMemoryError,))
    return answers[given, wanted]


def _described(tree: Any, of_outputs: bool) -> tuple[Leaf, ...]:
    """Shapes and dtypes of the tensors, as the core's trial draws stand-ins for them."""
    found = []
    for leaf in leaves(tree):
        if isinstance(leaf, torch.Tensor):
            name = str(leaf.dtype).removeprefix("torch.")
            drawn = name if hasattr(np, name) else "float32"  # bfloat16 and float8, which NumPy does not have
            found.append(Leaf(tuple(leaf.shape), drawn, of_outputs and continuous(leaf)))
    return tuple(found)


def _filled(tree: Any, arrays: list[np.ndarray]) -> Any:
    """The structure with these arrays in the place of its tensors, in their dtypes and on their devices."""
    given = iter(arrays)

    def stand_in(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return torch.as_tensor(next(given)).to(leaf.device, leaf.dtype)

    return map_leaves(stand_in, tree)


def _answers(loss: Callable) -> dict[tuple, bool]:
    """What is known of a loss as long as it lives; nothing of what cannot be referred to weakly.

    A function that depends on nothing but its code is the same one when a loop makes it anew.
    """
    plain = isinstance(loss, types.FunctionType) and not (loss.__closure__ or loss.__defaults__ or loss.__kwdefaults__)
    try:
        return _MEANS.setdefault(loss.__code__ if plain else loss, {})
    except TypeError:
        return {}


_MEANS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
"""{loss: {shapes and dtypes: whether it is a mean over samples}}."""
