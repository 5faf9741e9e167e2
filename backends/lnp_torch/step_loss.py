"""The loss of a training step and its gradient dL/df, from the step's own graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from array_api_compat import torch as xp

from lnp.contract.options import Options
from lnp.contract.trees import map_leaves
from lnp.losses import kinds
from lnp.losses.evidence import OF_THE_STEP, told
from lnp_torch import losses
from lnp_torch.averages import Averages
from lnp_torch.graph import edge, reached
from lnp_torch.loss_gradient import repeated, seen_terms
from lnp_torch.outputs import Outputs, flatten, real, widened
from lnp_torch.own_loss import computed_from, derivatives
from lnp_torch.replica import Replica
from lnp_torch.state_guard import RandomState

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
    is returned twice stays one: two would add up their gradients in another order. A loss that the model has computed
    itself comes from the outputs as they are.
    """
    outputs = Outputs(returned)
    found = {id(leaf): leaf for leaf in outputs.candidates}
    own = outputs.own_loss
    if len(found) < 2 or (own is not None and own.requires_grad):
        return returned
    made = {key: Output.apply(leaf) if leaf.requires_grad else leaf for key, leaf in found.items()}
    return map_leaves(lambda leaf: made.get(id(leaf), leaf), returned)


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
    leaves, parts = outputs.leaves, outputs.parts
    used = replace(outputs, measured=tuple({id(leaf): place for place, leaf in _trained(outputs)}.values()))
    found = derivatives(loss, used)
    grads = {id(leaf): widened(real(d)) / scale for leaf, d in zip(used.leaves, found, strict=True)}
    if len({id(leaf) for leaf in leaves}) == len(leaves):
        return flatten([grads.get(id(leaf), torch.zeros_like(p)) for leaf, p in zip(leaves, parts, strict=True)])
    if criterion is None:
        raise RuntimeError(TWICE)
    return _of_each(criterion, outputs, grads)


def _trained(outputs: Outputs) -> list[tuple[int, torch.Tensor]]:
    """(place, leaf) of the measured outputs that need a gradient."""
    places = outputs.measured if outputs.measured is not None else range(len(outputs.candidates))
    return [(place, leaf) for place, leaf in zip(places, outputs.leaves, strict=True) if leaf.requires_grad]


def step_outputs(loss: Any, returned: Any) -> Outputs:
    """What a model returned in a step, with those outputs measured that the loss was computed from; and constants, of
    which that cannot be seen.
    """
    outputs = Outputs(returned)
    if not (isinstance(loss, torch.Tensor) and loss.ndim == 0 and loss.requires_grad and outputs.candidates):
        raise ValueError(
            "backward() received a loss that cannot be differentiated in the outputs. Expected a tensor of shape () "
            "that was computed from what the model returned inside `with lnp_torch.shared(model) as step:`."
        )
    if not reached([edge(loss)], {edge(leaf) for leaf in outputs.candidates})[0]:
        raise ValueError(
            "backward() received a loss that does not depend on the outputs that the model returned inside the "
            "context. Expected the loss of this very forward pass."
        )
    measured = computed_from(loss, outputs)
    samples = len(measured.leaves[0])
    constant = [
        place
        for place, leaf in enumerate(outputs.candidates)
        if not leaf.requires_grad and leaf.ndim and len(leaf) == samples
    ]
    return replace(measured, measured=tuple(sorted({*(measured.measured or ()), *constant})))


def _of_each(criterion: Callable[[Any], torch.Tensor], outputs: Outputs, sums: dict[int, torch.Tensor]) -> torch.Tensor:
    """dL/df where a tensor is returned twice: in the step's own graph the loss has one derivative in both.

    The criterion tells them apart, if it is what the loss was computed by: its derivatives add up to the step's.
    """
    given = outputs.leaves
    apart = [part.detach().clone().requires_grad_(part.requires_grad) for part in outputs.parts]
    with torch.enable_grad():
        value = criterion(outputs.with_parts(apart)).sum()
    used = [leaf for leaf in apart if leaf.requires_grad]
    found = iter(torch.autograd.grad(value, used, allow_unused=True, materialize_grads=True))
    grads = [next(found) if leaf.requires_grad else torch.zeros_like(leaf) for leaf in apart]
    for key, total in sums.items():
        same = sum(grad for grad, leaf in zip(grads, given, strict=True) if id(leaf) == key)
        if not (same - total).abs().max() <= AGREE * total.abs().max():
            raise RuntimeError(TWICE)
    return flatten([widened(grad) for grad in grads])


class StepCriterion:
    """What the user says that a step's loss was computed by: a loss, and its targets.

    Parameters
    ----------
    outputs, targets:
        Of the step.
    options:
        With the loss, or None for one that is inferred.
    state:
        Random states after the forward pass.

    Raises
    ------
    ValueError, TypeError
        For a loss that cannot be meant.
    """

    def __init__(self, outputs: Outputs, targets: Any, options: Options, state: RandomState) -> None:
        self._outputs, self._targets = outputs, targets
        tree = outputs.with_parts([part.detach() for part in outputs.parts])
        self.meant: kinds.Prepared = losses.prepare(options.loss, tree, targets, options.loss_terms)
        self._run = on_its_copy(self.meant.function, state)

    def __call__(self, tree: Any) -> torch.Tensor:
        """The loss at other outputs, shape (). It may write to them, and they may lie in the step's own memory."""
        copies = map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tree)
        return self._run(copies, self._targets).sum()

    def terms(self) -> tuple[Any, tuple[str, ...]]:
        """(`loss_terms`, notes), as they are known or seen when the loss is computed once more."""
        if self.meant.terms is not None:
            return self.meant.terms, self.meant.notes
        averages, value, parts = self._seen()
        return seen_terms(averages, value, parts, self._targets)

    def sample_terms(self) -> torch.Tensor | None:
        """What each sample weighs, (N,), as it is known or seen when the loss is computed once more."""
        if self.meant.sample_terms is not None:
            return self.meant.sample_terms
        averages, value, parts = self._seen()
        return averages.sample_terms(value, parts)

    def _seen(self) -> tuple[Averages, torch.Tensor, list[torch.Tensor]]:
        """What has watched the loss being computed once more, the loss, and the outputs that it was given."""
        parts = [part.detach().requires_grad_() for part in self._outputs.parts]
        with torch.enable_grad(), Averages() as averages:
            value = self(self._outputs.with_parts(parts))
        return averages, value, parts

    def is_mean(self) -> bool:
        """Whether it is a mean over samples, known or found out."""
        return self.meant.separable or losses.found_mean(self.meant.function, self._run, self._outputs, self._targets)

    def difference(self, loss: torch.Tensor) -> str:
        """What is to be said where it is not the loss that is trained on, or ""; nothing of one with a state."""
        outputs = Outputs(self._outputs.tree)
        try:
            with torch.enable_grad():  # a loss may differentiate in the outputs, and write to them
                tree = outputs.with_parts([part.detach().requires_grad_().clone() for part in outputs.parts])
                own, value = float(self(tree).detach()), float(loss)
                if abs(own - value) <= AGREE * max(abs(own), abs(value)) or self._run(tree, self._targets, 2) != own:
                    return ""
        except Exception:  # what it raises here it did not raise in the step: they are not the same, for sure
            return DIFFERS.format("is another one")
        return DIFFERS.format(f"is {value:.6g}, and the criterion gives {own:.6g}")


def step_sample_terms(
    averages: Averages, loss: torch.Tensor, outputs: Outputs, criterion: StepCriterion | None
) -> torch.Tensor | None:
    """What each sample weighs in a step's loss, (N,): as seen of this very loss, or of the criterion."""
    if criterion is None or averages.terms(loss, outputs.leaves) is not None:
        return averages.sample_terms(loss, outputs.leaves)
    return criterion.sample_terms()


def step_told(criterion: StepCriterion | None, gradient: torch.Tensor) -> dict[str, Any]:
    """Keywords of the record: which loss a step has, and what shows whether it was meant, as far as that is known."""
    return {"loss_name": OF_THE_STEP} if criterion is None else told(xp, criterion.meant, gradient)


DIFFERS = (
    "the loss that is trained on {}: measured is the former; pass scale= if it was multiplied with something, to "
    "accumulate gradients for example, or the criterion and targets that it was computed with"
)


def on_its_copy(function: Callable, state: RandomState) -> Callable[..., torch.Tensor]:
    """The user's loss as it was after the forward pass, on a copy of it at each call; called in turn, if asked."""

    def run(outputs: Any, targets: Any, times: int = 1) -> torch.Tensor:
        replica = Replica((function,))
        replica.rewind({})
        loss = repeated(replica.roots[0], state)
        try:
            return [loss(outputs, targets) for _ in range(times)][-1]
        finally:
            replica.restore()
            replica.clear()

    return run
