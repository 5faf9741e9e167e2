"""Losses in PyTorch: their values, the number of terms that they average, and whether they are means over samples."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from array_api_compat import torch as xp
from torch.nn import functional as F

from lnp.contract.trees import leaves, map_leaves
from lnp.losses import kinds, mean_test
from lnp.losses.mean_test import Leaf
from lnp_torch.averages import Averages
from lnp_torch.outputs import Outputs, continuous, flatten, wide
from lnp_torch.reductions import check_labels, integer, own_loss

Loss = Callable[[Any, Any], torch.Tensor]
"""(outputs, targets) -> scalar, where both may be of any structure."""

OTHERS = "the loss has terms that do not come from the outputs: they are trained on, and left out here"


def prepare(loss: str | Callable | None, outputs: Any, targets: Any, loss_terms: int | None) -> kinds.Prepared:
    """The loss that the user means; `loss_terms` is the user's own n, or None.

    A loss of the user's gets what the model returned, whole. One of lnp's own takes the only tensor in it.
    """
    found = [outputs] if isinstance(outputs, torch.Tensor) else [leaf for leaf in leaves(outputs) if continuous(leaf)]
    if not callable(loss) and len(found) == 1 and found[0] is not outputs:
        prepared = prepare(loss, found[0], targets, loss_terms)
        inner = prepared.function
        return replace(prepared, function=lambda tree, targets: inner(_only(tree), targets))
    leaf = found[0]
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


def _only(tree: Any) -> torch.Tensor:
    """The tensor of numbers in a structure that has one."""
    return next(leaf for leaf in leaves(tree) if continuous(leaf))


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


def _prepared_own(loss: Callable, given: kinds.Given, targets: Any) -> kinds.Prepared:
    """A loss of PyTorch's or the user's own, whose terms are counted where they are averaged.

    Only of PyTorch's it is known whether it is a mean over samples; not where it broadcasts: (N, 1) with (N,) pairs all
    samples.
    """
    own = own_loss(loss)
    if own is not None and not given.single:
        raise TypeError(
            f"{_named(loss)} was given for outputs or targets that are not one tensor each, which it does not take. "
            "Expected a loss that takes what the model returns, whole. Pass loss=, a callable such as "
            "lambda outputs, targets: criterion(outputs.logits, targets)."
        )
    takes, axis = ("", None) if own is None else (own.takes, 1 if own.over == "labels" else -1)
    if own is None or (own.over == "elements" and given.outputs != given.targets):
        return kinds.Prepared(loss, None, kinds.separable(loss), takes=takes, axis=axis)
    if own.over == "labels":
        check_labels(own, given.outputs or (), targets)
    # A sum is N times a mean over samples, so its position and noise scale would be the mean's; its rate however is
    # that of N times the loss, which says nothing about the population until N is divided out.
    return kinds.Prepared(loss, None, own.reduction in ("mean", "batchmean"), takes=takes, axis=axis)


def _named(loss: Any) -> str:
    inner = loss.func if isinstance(loss, functools.partial) else loss
    return getattr(inner, "__name__", type(inner).__name__)


def found_mean(loss: Callable, run: Loss, outputs: Outputs, targets: Any) -> bool:
    """Whether a loss of the user's own is a mean over samples, tried once for each loss, shapes and dtypes.

    `loss` is the user's, by which the answer is remembered; `run` computes it and leaves no trace.
    """
    measured = frozenset(map(id, outputs.leaves))
    fixed = frozenset(map(id, outputs.candidates)) - measured
    given, wanted = _described(outputs.tree, measured, fixed), _described(targets)
    answers = _answers(loss)
    if (given, wanted) not in answers:

        def gradient(made: list[np.ndarray], labels: list[np.ndarray]) -> torch.Tensor:
            """(M, K) loss gradient at stand-ins for the outputs and targets."""
            stand_in = Outputs(_filled(outputs.tree, made, fixed), outputs.measured)
            parts = [part.to(wide([part])).requires_grad_() for part in stand_in.parts]
            with torch.enable_grad(), Averages() as averages:
                value = run(stand_in.with_parts([part.clone() for part in parts]), _filled(targets, labels))
            weights = averages.sample_terms(value, parts)
            grads = torch.autograd.grad(value.sum(), parts, allow_unused=True, materialize_grads=True)
            # samples may weigh differently, by their classes or labels that are ignored: of such a mean W' g' = W g
            return flatten(list(grads)) * (1.0 if weights is None else weights.sum() / len(weights))

        answers[given, wanted] = mean_test.found_mean(xp, gradient, given, wanted, (torch.OutOfMemoryError,))
    return answers[given, wanted]


NONE: frozenset[int] = frozenset()


def _described(tree: Any, measured: frozenset[int] = NONE, fixed: frozenset[int] = NONE) -> tuple[Leaf, ...]:
    """Shapes and dtypes of the tensors, as the core's trial draws stand-ins for them; not of those that stay."""
    found = []
    for leaf in leaves(tree):
        if isinstance(leaf, torch.Tensor) and id(leaf) not in fixed:
            name = str(leaf.dtype).removeprefix("torch.")
            drawn = name if hasattr(np, name) else "float32"  # bfloat16 and float8, which NumPy does not have
            found.append(Leaf(tuple(leaf.shape), drawn, id(leaf) in measured))
    return tuple(found)


def _filled(tree: Any, arrays: list[np.ndarray], fixed: frozenset[int] = NONE) -> Any:
    """The structure with these arrays in the place of its tensors, in their dtypes and on their devices."""
    given = iter(arrays)

    def stand_in(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or id(leaf) in fixed:
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
