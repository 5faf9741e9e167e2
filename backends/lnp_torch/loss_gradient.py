"""The loss of a batch and its gradient dL/df, at the outputs of a measurement's first pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from array_api_compat import torch as xp

from lnp.contract import validation
from lnp.contract.options import Options
from lnp.losses import kinds
from lnp.losses.evidence import OF_THE_MODEL, OF_THE_STEP, told
from lnp_torch import losses, sample_losses
from lnp_torch.averages import Averages
from lnp_torch.graph import edge, reached
from lnp_torch.host_steps import HostStep
from lnp_torch.model import Program
from lnp_torch.outputs import Outputs, flatten, wide
from lnp_torch.own_loss import checked_own_loss, computed_from, own_gradient, own_terms
from lnp_torch.reductions import integer
from lnp_torch.replay import Passes, copied
from lnp_torch.state_guard import RandomState, same_randomness

INDEPENDENT = (
    "The loss does not depend on the outputs. Expected loss(outputs, targets) to be differentiable: do not detach the "
    "outputs or convert them to NumPy."
)


@dataclass(frozen=True)
class LossAt:
    """The loss at a batch's outputs, and how to compute it at others.

    Attributes
    ----------
    value:
        L, shape ().
    gradient:
        g = dL/df, (N, K), in float32 or better.
    terms, separable, violations, notes, sample_terms:
        As in `lnp.losses.kinds.Prepared`.
    told:
        Keywords of `lnp.Linearization`: which loss it is, and what shows whether it was meant.
    at:
        Outputs -> L, shape ().
    alone:
        Passes of the batch -> (N,) the loss of each sample by itself; None where nothing can be repeated.
    """

    value: torch.Tensor
    gradient: torch.Tensor
    terms: Any
    at: Callable[[Outputs], torch.Tensor]
    separable: bool
    violations: tuple[tuple[torch.Tensor, str], ...] = ()
    notes: tuple[str, ...] = ()
    sample_terms: torch.Tensor | None = None
    told: Mapping[str, Any] = field(default_factory=dict)
    alone: Callable[[Passes], torch.Tensor] | None = None


def loss_at(
    prepared: Program, outputs: Outputs, targets: Any, options: Options, averages: Averages | None
) -> tuple[LossAt, Outputs]:
    """The loss of a measurement at the outputs of its first pass, and which of these are measured.

    Without targets the loss is that of the model itself, and `averages` has watched how it was computed.

    Raises
    ------
    ValueError, TypeError
        For a loss that is no scalar, or that cannot be differentiated in the outputs.
    """
    if targets is None:
        assert averages is not None, "it has watched the pass in which the model computed its loss"
        found, outputs = models_own(outputs, options, averages)
        return found, outputs
    _check_lengths(outputs, targets)
    # in float32 or better, also for narrower outputs: the gradient of a mean over many terms is small
    parts = [part.detach().to(wide([part])).requires_grad_() for part in outputs.parts]
    tree = outputs.with_parts(parts)
    loss = losses.prepare(options.loss, tree, targets, options.loss_terms)
    run = repeated(
        loss.function if loss.function is not options.loss else prepared.loss, RandomState([prepared.device])
    )
    found, outputs = _at_outputs(prepared, run, loss, outputs, parts, targets, options)
    return replace(found, told=told(xp, loss, found.gradient)), outputs


def _at_outputs(
    prepared: Program, run: losses.Loss, loss: kinds.Prepared, outputs: Outputs, parts: list[torch.Tensor],
    targets: Any, options: Options,
) -> tuple[LossAt, Outputs]:  # fmt: skip
    """A loss that is given the outputs, detached in these parts; measured are those that it depends on."""
    with torch.enable_grad(), Averages() as averages:
        value = run(outputs.with_parts([part.clone() for part in parts]), targets)  # a loss may write to outputs
        _check(value)
    found = torch.autograd.grad(value.sum(), parts, allow_unused=True, retain_graph=True)
    used = tuple(place for place, d in enumerate(found) if d is not None)
    if not used:
        raise ValueError(INDEPENDENT)
    outputs = replace(outputs, measured=used)
    terms, notes, weights = loss.terms, loss.notes, loss.sample_terms
    depended = [parts[place] for place in used]
    if terms is None:
        terms, notes = seen_terms(averages, value, depended, targets)
    if weights is None:
        weights = averages.sample_terms(value, depended)

    def at(other: Outputs) -> torch.Tensor:
        with torch.enable_grad():  # a loss may differentiate in the outputs
            parts = [part.detach().to(wide([part])).requires_grad_().clone() for part in other.parts]
            return run(other.with_parts(parts), targets).sum().detach()

    def anew(outputs: Any, targets: Any) -> torch.Tensor:
        prepared.rewind()
        return run(outputs, targets)

    def alone(passes: Passes) -> torch.Tensor:
        prepared.rewind()
        function = loss.function if loss.function is not options.loss else prepared.loss
        return sample_losses.of_outputs(function, anew, outputs, targets)

    wanted = options.split and options.population is not False
    separable = loss.separable or (wanted and losses.found_mean(loss.function, anew, outputs, targets))
    _, past = reached([edge(value)], {edge(part) for part in parts})
    notes = (*notes, losses.OTHERS) if past else notes
    gradient = flatten([d for d in found if d is not None])
    value = value.detach().sum()
    made = LossAt(value, gradient, terms, at, separable, loss.violations, notes, weights, alone=alone)
    return made, outputs


def _check_lengths(outputs: Outputs, targets: Any) -> None:
    """Raise ValueError for outputs that hold no samples, and for another number of targets."""
    shapes = [leaf.shape for leaf in outputs.candidates]
    if len(shapes) < 2:
        samples = validation.check_outputs(shapes)
        if isinstance(targets, torch.Tensor):
            validation.check_lengths(samples, targets.shape)


def seen_terms(
    averages: Averages, loss: torch.Tensor, outputs: list[torch.Tensor], targets: Any
) -> tuple[Any, tuple[str, ...]]:
    """(`loss_terms`, notes) as it was seen while the loss was computed; else assumed from the targets."""
    found = averages.terms(loss, outputs)
    if found is not None:
        return found
    one = targets if isinstance(targets, torch.Tensor) else None
    terms, note = kinds.assumed_terms(xp, outputs[0].shape, one, integer(one))
    return terms, (note,)


def models_own(outputs: Outputs, options: Options, averages: Averages) -> tuple[LossAt, Outputs]:
    """The loss that the model has computed, and the outputs that it has computed it from."""
    loss = checked_own_loss(outputs)
    outputs = computed_from(loss, outputs)
    terms, notes = own_terms(averages, loss, outputs) if options.loss_terms is None else (options.loss_terms, ())
    _, past = reached([edge(loss)], {edge(leaf) for leaf in outputs.leaves})
    gradient = own_gradient(loss, outputs, terms)
    notes = (*notes, losses.OTHERS) if past else notes
    weights = averages.sample_terms(loss, outputs.leaves)
    found = LossAt(
        value=loss.detach().sum(),
        gradient=gradient,
        terms=terms,
        at=_computed_by_the_model,
        separable=False,
        notes=notes,
        sample_terms=weights,
        told={"loss_name": OF_THE_STEP if isinstance(options.forward, HostStep) else OF_THE_MODEL},
        alone=sample_losses.by_the_model,
    )
    return found, outputs


def _computed_by_the_model(outputs: Outputs) -> torch.Tensor:
    """The loss that came with the outputs, shape ()."""
    assert outputs.own_loss is not None, "the model has computed one for the same inputs before"
    return outputs.own_loss.sum()


def _check(value: Any) -> None:
    """Raise TypeError or ValueError for a loss that is no differentiable scalar."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"The loss returned {type(value).__name__}. Expected a tensor of shape ().")
    validation.check_loss(value.shape)
    if not value.requires_grad:
        raise ValueError(INDEPENDENT)


def repeated(loss: Callable, state: RandomState) -> losses.Loss:
    """The loss, drawing the same numbers at each call, on targets that it may write to."""

    def run(outputs: Any, targets: Any) -> torch.Tensor:
        with same_randomness(state):
            return loss(outputs, copied(targets))

    return run
