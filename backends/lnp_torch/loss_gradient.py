"""The loss of a batch and its gradient dL/df: from the outputs of a pass, or from a training step's own graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lnp.contract import validation
from lnp.contract.options import Options
from lnp.contract.trees import leaves, map_leaves
from lnp.losses import kinds
from lnp_torch import losses
from lnp_torch.huggingface import own_loss_terms
from lnp_torch.model import Program
from lnp_torch.outputs import Outputs, continuous, flatten, read, real, wide, widened
from lnp_torch.replay import copied
from lnp_torch.replica import Replica
from lnp_torch.state_guard import RandomState, same_randomness

TWICE = (
    "The model returns one tensor twice, and in the step's own graph the loss has one derivative in both. Expected "
    "outputs that are different tensors, or backward(loss, targets, criterion) with what the loss was computed by. "
    "Call lnp.decompose, which makes a pass of its own."
)
AGREE = 1e-3
"""Relative difference up to which a criterion is what the step's loss was computed by."""


@dataclass(frozen=True)
class LossAt:
    """The loss at a batch's outputs, and how to compute it at others.

    Attributes
    ----------
    value:
        L, shape ().
    gradient:
        g = dL/df, (N, K), in float32 or better.
    terms, separable, violations, notes:
        As in `lnp.losses.kinds.Prepared`.
    at:
        Outputs -> L, shape ().
    """

    value: torch.Tensor
    gradient: torch.Tensor
    terms: Any
    at: Callable[[Outputs], torch.Tensor]
    separable: bool
    violations: tuple[tuple[torch.Tensor, str], ...] = ()
    notes: tuple[str, ...] = ()


def loss_at(prepared: Program, inputs: Any, outputs: Outputs, targets: Any, options: Options) -> LossAt:
    """The loss of a measurement at the outputs of its first pass; without targets that of the model itself.

    Raises
    ------
    ValueError, TypeError
        For a loss that is no scalar, or that cannot be differentiated in the outputs.
    """
    if targets is None:
        return _models_own(prepared, inputs, outputs, options)
    # in float32 or better, also for narrower outputs: the gradient of a mean over many terms is small
    detached = [part.detach().to(wide([part])).requires_grad_() for part in outputs.parts]
    tree = outputs.with_parts(detached)
    loss = losses.prepare(options.loss, tree, targets, options.loss_terms)
    meant = loss.function if loss.function is not options.loss else prepared.loss
    run = repeated(meant, RandomState([prepared.device]))
    with torch.enable_grad():
        value = run(outputs.with_parts([part.clone() for part in detached]), targets)  # a loss may write to outputs
        _check(value)
        grads = torch.autograd.grad(value.sum(), detached, allow_unused=True, materialize_grads=True)

    def at(other: Outputs) -> torch.Tensor:
        return run(other.with_parts([part.to(wide([part]), copy=True) for part in other.parts]), targets).sum()

    def anew(outputs: Any, targets: Any) -> torch.Tensor:
        prepared.rewind()
        return run(outputs, targets)

    wanted = options.split and options.population is not False
    separable = loss.separable or (wanted and losses.found_mean(loss.function, anew, outputs, targets))
    notes = (*loss.notes, losses.OTHERS) if losses.other_terms(value, detached) else loss.notes
    return LossAt(value.detach().sum(), flatten(list(grads)), loss.terms, at, separable, loss.violations, notes)


def _models_own(prepared: Program, inputs: Any, outputs: Outputs, options: Options) -> LossAt:
    """The loss that the model has computed from labels."""
    if outputs.own_loss is None or not outputs.own_loss.requires_grad:
        raise ValueError(
            "The batch is a dictionary, but the model returned no loss and logits for it. Expected a model that "
            "computes its own loss from labels. Pass (inputs, targets), and loss= if it cannot be inferred."
        )
    terms, separable, notes = own_loss_terms(prepared.modules, inputs, outputs)
    terms = terms if options.loss_terms is None else options.loss_terms
    if outputs.auxiliary_loss is None and losses.other_terms(outputs.own_loss, outputs.parts):
        notes = (*notes, losses.OTHERS)
    gradient = _own_gradient(outputs.own_loss, outputs.parts, terms)
    return LossAt(outputs.own_loss.detach(), gradient, terms, _computed_by_the_model, separable, notes=notes)


def _computed_by_the_model(outputs: Outputs) -> torch.Tensor:
    """The loss that came with the outputs, shape ()."""
    assert outputs.own_loss is not None, "the model has computed one for the same inputs before"
    return outputs.own_loss


def _check(value: Any) -> None:
    """Raise TypeError or ValueError for a loss that is no differentiable scalar."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"The loss returned {type(value).__name__}. Expected a tensor of shape ().")
    validation.check_loss(value.shape)
    if not value.requires_grad:
        raise ValueError(
            "The loss does not depend on the outputs. Expected loss(outputs, targets) to be differentiable: do "
            "not detach the outputs or convert them to NumPy."
        )


def repeated(loss: Callable, state: RandomState) -> losses.Loss:
    """The loss, drawing the same numbers at each call, on targets that it may write to."""

    def run(outputs: Any, targets: Any) -> torch.Tensor:
        with same_randomness(state):
            return loss(outputs, copied(targets))

    return run


def _own_gradient(loss: torch.Tensor, parts: list[torch.Tensor], terms: Any) -> torch.Tensor:
    """dL/df of the model's own loss, in float32 or better.

    The gradient of a mean over n terms is about 1/n, which float16 outputs would round away: it is taken of n L, as far
    as float16 goes.
    """
    if not any(part.dtype == torch.float16 for part in parts):
        return flatten(list(torch.autograd.grad(loss, parts, retain_graph=True)))
    scale = torch.as_tensor(terms, device=loss.device).float().log2().floor().clamp(0, 15).exp2()
    return flatten(list(torch.autograd.grad(loss, parts, scale.to(loss.dtype), retain_graph=True))) / scale


def separate_outputs(returned: Any) -> Any:
    """What the model returned, with outputs that the loss can be differentiated in one by one.

    One output may be computed from another: the loss's derivative in each is at the others as they are. A tensor that
    is returned twice stays one: two would add up their gradients in another order.
    """
    tree = read(returned).tree
    found = {id(leaf): leaf for leaf in leaves(tree) if continuous(leaf)}
    if len(found) < 2:
        return returned
    made = {key: Output.apply(leaf) if leaf.requires_grad else leaf for key, leaf in found.items()}
    return map_leaves(lambda leaf: made.get(id(leaf), leaf), tree)


class Output(torch.autograd.Function):
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


def prepared_loss(outputs: Outputs, targets: Any, options: Options) -> kinds.Prepared:
    """The loss that the step was computed with."""
    tree = outputs.with_parts([part.detach() for part in outputs.parts])
    return losses.prepare(options.loss, tree, targets, options.loss_terms)


def step_criterion(
    outputs: Outputs, targets: Any, options: Options, state: RandomState
) -> Callable[[Any], torch.Tensor] | None:
    """Outputs -> the loss that the step was computed with, if its targets are known."""
    if targets is None:
        return None
    return lambda tree: on_its_copy(prepared_loss(outputs, targets, options).function, state)(tree, targets)


def on_its_copy(function: Callable, state: RandomState) -> losses.Loss:
    """The user's loss as it was after the forward pass, on a copy of it at each call."""

    def run(outputs: Any, targets: Any) -> torch.Tensor:
        replica = Replica((function,))
        replica.rewind({})
        try:
            return repeated(replica.roots[0], state)(outputs, targets)
        finally:
            replica.restore()
            replica.clear()

    return run
