"""dL/df of a training step, from the step's own graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lnp.contract.trees import leaves, map_leaves
from lnp_torch.complex import continuous, real
from lnp_torch.outputs import Outputs, flatten, read, widened

TWICE = (
    "The model returns one tensor twice, and in the step's own graph the loss has one derivative in both. Expected "
    "outputs that are different tensors, or backward(loss, targets, criterion) with what the loss was computed by. "
    "Call lnp.decompose, which makes a pass of its own."
)
AGREE = 1e-3
"""Relative difference up to which a criterion is what the step's loss was computed by."""


def separate_outputs(returned: Any) -> Any:
    """What the model returned, with outputs that the loss can be differentiated in one by one.

    One output may be computed from another: the loss's derivative in each is at the others as they are. A tensor that
    is returned twice stays one: two would add up their gradients in another order.
    """
    tree = read(returned).tree
    found = {id(leaf): leaf for leaf in leaves(tree) if continuous(leaf)}
    if len(found) < 2:
        return returned
    made = {key: _Output.apply(leaf) if leaf.requires_grad else leaf for key, leaf in found.items()}
    return map_leaves(lambda leaf: made.get(id(leaf), leaf), tree)


class _Output(torch.autograd.Function):
    """The identity, in the same memory but no view."""

    @staticmethod
    def forward(ctx, y):
        return y.data

    @staticmethod
    def backward(ctx, d):
        return d


def loss_gradient(
    loss: torch.Tensor, outputs: Outputs, scale: Any, criterion: Callable[[Any], torch.Tensor] | None
) -> torch.Tensor:
    """dL/df, (N, K), in float32 or better.

    Parameters
    ----------
    loss, scale:
        Of the step, computed from the outputs, and what it was multiplied with.
    outputs:
        What the model returned.
    criterion:
        Outputs -> the loss without the scale, if it is known.

    Raises
    ------
    ValueError
        For a loss that does not depend on the outputs.
    RuntimeError
        For a tensor that is returned twice, if the criterion cannot tell its derivatives apart.
    """
    given = [leaf for leaf in leaves(outputs.tree) if continuous(leaf)]
    grads = _in_outputs(loss, given)
    if len(grads) == len(given):
        return flatten([widened(real(grads[id(leaf)])) / scale for leaf in given])
    if criterion is None:
        raise RuntimeError(TWICE)
    return _of_each(criterion, outputs.tree, given, {key: grad / scale for key, grad in grads.items()})


def _in_outputs(loss: torch.Tensor, given: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    """{id of an output: the loss's derivative in it}."""
    used = {id(leaf): leaf for leaf in given if leaf.requires_grad}
    if not (isinstance(loss, torch.Tensor) and loss.ndim == 0 and loss.requires_grad and used):
        raise ValueError(
            "backward() received a loss that cannot be differentiated in the outputs. Expected a tensor of shape () "
            "that was computed from what the model returned inside `with lnp_torch.shared(model) as step:`."
        )
    found = torch.autograd.grad(loss, list(used.values()), retain_graph=True, allow_unused=True)
    if all(grad is None for grad in found):
        raise ValueError(
            "backward() received a loss that does not depend on the outputs that the model returned inside the "
            "context. Expected the loss of this very forward pass."
        )
    known = {key: grad for key, grad in zip(used, found, strict=True) if grad is not None}
    return {id(leaf): known[id(leaf)] if id(leaf) in known else torch.zeros_like(leaf) for leaf in given}


def _of_each(
    criterion: Callable[[Any], torch.Tensor], tree: Any, given: list[torch.Tensor], sums: dict[int, torch.Tensor]
) -> torch.Tensor:
    """dL/df where a tensor is returned twice: in the step's own graph the loss has one derivative in both.

    The criterion tells them apart, if it is what the loss was computed by: its derivatives add up to the step's.
    """
    apart = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in given]
    values = iter(apart)
    with torch.enable_grad():
        value = criterion(map_leaves(lambda leaf: next(values) if continuous(leaf) else leaf, tree)).sum()
    used = [leaf for leaf in apart if leaf.requires_grad]
    found = iter(torch.autograd.grad(value, used, allow_unused=True, materialize_grads=True))
    grads = [next(found) if leaf.requires_grad else torch.zeros_like(leaf) for leaf in apart]
    for key, total in sums.items():
        same = sum(grad for grad, leaf in zip(grads, given, strict=True) if id(leaf) == key)
        if not (same - total).abs().max() <= AGREE * total.abs().max():
            raise RuntimeError(TWICE)
    return flatten([widened(real(grad)) for grad in grads])
