"""Losses that models compute themselves, and the batches that they compute them from: dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from array_api_compat import torch as xp

from lnp.contract.validation import unpack
from lnp.losses import kinds, mean_test
from lnp_torch.averages import Averages
from lnp_torch.graph import edge, reached, sources
from lnp_torch.outputs import Outputs, dot, flatten, real, widened
from lnp_torch.replay import Passes

NO_LOSS = (
    "The batch is a dictionary, but the model returned no loss for it that can be differentiated. Expected a model "
    "that computes its own loss from what the dictionary holds, such as labels, and returns it as `loss` or first of "
    "a tuple. Pass (inputs, targets), and loss= if it cannot be inferred."
)
NO_OUTPUTS = (
    "The model returned a loss, and none of the outputs that it was computed from. Expected logits beside it, or the "
    "like, sample axis first. Pass (inputs, targets) and loss=, or forward=, a function (model, inputs) -> "
    "{'loss': ..., 'outputs': ...}."
)


def split_batch(batch: Any, loss: Any) -> tuple[Any, Any]:
    """(inputs, targets); targets are None where the model computes its own loss from a dictionary."""
    if not isinstance(batch, Mapping):
        return unpack(batch)
    inputs = dict(batch)
    if loss is None:
        return inputs, None
    if "labels" not in inputs:
        raise ValueError(
            f"The batch is a dictionary with {sorted(inputs)}, without labels, which are what loss= is called with. "
            "Expected 'labels' among them. Add them, pass (inputs, targets), or leave out loss= where the model "
            "computes its own."
        )
    return {name: value for name, value in inputs.items() if name != "labels"}, inputs["labels"]


def checked_own_loss(outputs: Outputs) -> torch.Tensor:
    """The loss that the model computed; ValueError without one."""
    loss = outputs.own_loss
    if loss is None or not loss.requires_grad:
        raise ValueError(NO_LOSS)
    return loss


def computed_from(loss: torch.Tensor, outputs: Outputs) -> Outputs:
    """The outputs with those measured that a loss in the same graph was computed from: met first on the way back."""
    candidates = outputs.candidates
    places: dict[Any, list[int]] = {}
    for place, leaf in enumerate(candidates):
        if leaf.ndim and edge(leaf) != edge(loss):
            places.setdefault(edge(leaf), []).append(place)
    met, _ = reached([edge(loss)], places)
    found = sorted(place for end in met for place in places[end])
    if not found:
        raise ValueError(NO_OUTPUTS)
    # what has another number of rows is none of the samples' outputs: a router's logits for all tokens, say
    samples = len(candidates[found[0]])
    return Outputs(outputs.tree, tuple(place for place in found if len(candidates[place]) == samples))


def own_terms(averages: Averages, loss: torch.Tensor, outputs: Outputs) -> tuple[Any, tuple[str, ...]]:
    """(`loss_terms`, notes), as it was seen while the loss was computed."""
    seen = averages.terms(loss, outputs.leaves)
    if seen is not None:
        return seen
    terms, note = kinds.assumed_terms(xp, outputs.leaves[0].shape, None, False)
    return terms, (note,)


def derivatives(loss: torch.Tensor, outputs: Outputs, scale: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The loss's derivatives in the measured outputs, each with the others held fixed.

    Where one output was computed from another, the graph's derivative in the latter includes the way through the
    former, which is taken off.
    """
    leaves = outputs.leaves
    found = list(torch.autograd.grad(loss, leaves, scale, retain_graph=True))
    behind = [_behind(place, leaves) for place in range(len(leaves))]
    order = sorted(range(len(leaves)), key=lambda place: -len(behind[place]))
    for place in order:
        through = [other for other in order if place in behind[other]]
        if through:
            ends, cotangents = [leaves[other] for other in through], [found[other] for other in through]
            (part,) = torch.autograd.grad(ends, leaves[place], cotangents, retain_graph=True)
            found[place] = found[place] - part
    return found


def _behind(place: int, leaves: list[torch.Tensor]) -> set[int]:
    """Places of the outputs that one was computed from, however indirectly."""
    if len(leaves) == 1:
        return set()
    places = {edge(leaf): other for other, leaf in enumerate(leaves) if other != place}
    found, starts = set(), sources(edge(leaves[place]))
    while starts:
        met, _ = reached(starts, places)
        starts = [start for end in met if places[end] not in found for start in sources(end)]
        found |= {places[end] for end in met}
    return found


def own_gradient(loss: torch.Tensor, outputs: Outputs, terms: Any) -> torch.Tensor:
    """dL/df of the model's own loss, (N, K), in float32 or better.

    The gradient of a mean over n terms is about 1/n, which float16 outputs would round away: it is taken of n L, as far
    as float16 goes.
    """
    if not any(leaf.dtype == torch.float16 for leaf in outputs.leaves):
        return flatten([widened(real(d)) for d in derivatives(loss, outputs)])
    scale = torch.as_tensor(terms, device=loss.device).float().log2().floor().clamp(0, 15).exp2()
    found = derivatives(loss, outputs, scale.to(loss.dtype).expand_as(loss))
    return flatten([widened(real(d)) for d in found]) / scale


FEW = 2
"""Samples whose loss is computed without the others."""


def shown_mean(passes: Passes, gradient: torch.Tensor, terms: Any, tolerance: float, seed: Any) -> bool:
    """Whether a model's own loss is a mean over samples, in this batch: some of them without the others have the loss
    gradient that they have among them, but for the numbers of terms, n' g' = n g.

    Looked at in every batch, for what a loss does in one says nothing of the next. That is exact with padding too.
    """
    size = min(FEW, passes.samples - 1)
    if size < 1 or not passes.divisible:
        return False
    order = np.random.default_rng(np.random.SeedSequence((seed, passes.samples, FEW))).permutation(passes.samples)
    index = torch.as_tensor(np.sort(order[:size]), device=passes.program.device)
    found = _gradient_of_some(passes, index, list(passes.program.parameters)[-1:])
    found = _gradient_of_some(passes, index, list(passes.program.parameters)) if found is None else found
    if found is None:
        return False
    expected = terms * gradient[index]
    least = max(mean_test.TOLERANCE, tolerance)
    size = dot(expected, expected)
    apart = found.sub_(expected)
    return bool(mean_test.tells(xp, expected) & (dot(apart, apart) <= least**2 * size))


def _gradient_of_some(passes: Passes, index: torch.Tensor, names: list[str]) -> torch.Tensor | None:
    """n' g' of the model's own loss for some samples without the others, with a graph that leads to these parameters:
    to the last one it is short. None where the model does not run so, or its loss is not reached from there.
    """
    parameters = {name: p if name in names else p.detach() for name, p in passes.program.parameters.items()}
    try:
        with torch.enable_grad(), Averages() as averages:
            outputs = passes.part(parameters, index)
            loss = checked_own_loss(outputs)
        alone, _ = own_terms(averages, loss, outputs)
        return alone * own_gradient(loss, outputs, alone)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever the model raises on a part of its batch
        return None
