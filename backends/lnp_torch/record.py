"""From a PyTorch model and a batch to the record that the core works on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from array_api_compat import torch as xp
from torch.nn import functional as F

from lnp.contract import validation
from lnp.contract.linearization import Linearization, coupling_tolerance
from lnp.contract.options import Options
from lnp.contract.trees import map_leaves
from lnp_torch import fallback, losses
from lnp_torch.huggingface import own_loss_terms, split_batch
from lnp_torch.model import Program
from lnp_torch.outputs import Outputs, dot, flatten, wide, widened
from lnp_torch.pulls import Pulls, Vector, jvp, subset
from lnp_torch.replay import Passes, copied, first_pass
from lnp_torch.self_check import general_note, judge
from lnp_torch.separable import found_separable
from lnp_torch.state_guard import RandomState, same_randomness, undisturbed
from lnp_torch.taps.backward_pass import Apart, Tapped, Verdict, tapped_groups
from lnp_torch.taps.function_mode import Taps

WORTH = {"cpu": 2**27}
"""Multiplications of a forward pass from which on one over some of the samples pays: below, Python takes as long."""
WORTH_ELSEWHERE = 2**34


@dataclass(frozen=True)
class Loss:
    """The loss at the first pass's outputs, and how to compute it at others."""

    value: torch.Tensor
    gradient: torch.Tensor
    terms: Any
    of: Callable[[Outputs], torch.Tensor]
    separable: bool
    violations: tuple = ()
    notes: tuple[str, ...] = ()


def record(prepared: Program, batch: Any, options: Options) -> Linearization:
    """Linearise a model on a batch."""
    inputs, targets = split_batch(batch, options.loss)
    # what was made in inference mode can take no part in a derivative
    targets = map_leaves(lambda t: t.clone() if isinstance(t, torch.Tensor) and t.is_inference() else t, targets)
    whole = options.microbatch is None
    taps = Taps(prepared.parameters) if whole and options.split else None
    outputs, repeat = first_pass(
        prepared, inputs, options.batch_statistics == "frozen", whole or targets is None, taps or nullcontext()
    )
    parts = outputs.parts
    flat = flatten([part.detach() for part in parts])
    if isinstance(targets, torch.Tensor):
        validation.check_lengths(flat.shape[0], targets.shape)
    loss = _loss(prepared, inputs, outputs, targets, options)
    passes = repeat(flat.shape[0])
    parameters = list(prepared.parameters.values())
    if whole:
        one = [] if taps is None else [Tapped(slice(0, flat.shape[0]), parts, taps)]
        apart = Apart(passes, lambda: one, flat)
        gradients = lambda v: fallback.gradients(parts, parameters, v)
    else:
        pull_groups = fallback.looped(passes, options.microbatch or flat.shape[0])
        apart = Apart(passes, lambda: tapped_groups(passes, options.microbatch or flat.shape[0]), flat)
        gradients = lambda v: fallback.total(pull_groups, v)
    found, notes = taken_apart(apart, [part.dtype for part in parts], options)
    cheap = found is not None and not found.general
    both = options.population if options.population is not None else cheap and loss.separable
    pulls = Pulls(apart, found, gradients, loss.gradient, both, cheap, options.seed)
    made = assembled(pulls, loss, options, taps)
    if not whole:
        norms = lambda v: fallback.square_norms(pull_groups, v)
        made = replace(made, group_square_norms=norms, groups=-(-flat.shape[0] // options.microbatch))
    return replace(made, notes=(*made.notes, *notes))


def assembled(pulls: Pulls, loss: Loss, options: Options, taps: Taps | None) -> Linearization:
    """The record of pull-backs and a loss."""
    apart, passes = pulls.apart, pulls.apart.passes
    flat, names, independent = apart.outputs, list(passes.program.parameters), pulls.verdict is not None
    return Linearization(
        xp=xp,
        outputs=flat,
        loss=loss.value,
        loss_gradient=loss.gradient,
        loss_terms=loss.terms,
        vjp=pulls.vjp,
        gradient_square_norms=None if taps is None else pulls.gradient_square_norms,
        inner_products=lambda u, w: {n: dot(a, b) for n, a, b in zip(names, u, w, strict=True)},
        signs=_signs(options.seed, flat),
        jvp=lambda u: jvp(passes, u),
        sample_square_norms=pulls.sample_square_norms if independent else None,
        subset=(lambda size: subset(pulls, options.microbatch, size)) if independent else None,
        subset_pays=taps is None or taps.products > WORTH.get(flat.device.type, WORTH_ELSEWHERE),
        cheap=pulls.cheap,
        loss_along=lambda u, step: _loss_along(passes, loss, u, step),
        separable=loss.separable,
        violations=loss.violations,
        notes=(*_frozen_notes(passes), *loss.notes),
    )


def _loss(prepared: Program, inputs: Any, outputs: Outputs, targets: Any, options: Options) -> Loss:
    """L, g = dL/df and the number of terms."""
    parts = outputs.parts
    if targets is None:
        if outputs.own_loss is None or not outputs.own_loss.requires_grad:
            raise ValueError(
                "The batch is a dictionary, but the model returned no loss and logits for it. Expected a model that "
                "computes its own loss from labels. Pass (inputs, targets), and loss= if it cannot be inferred."
            )
        terms, separable, notes = own_loss_terms(prepared.modules, inputs, outputs)
        terms = terms if options.loss_terms is None else options.loss_terms
        if outputs.auxiliary_loss is None and losses.other_terms(outputs.own_loss, parts):
            notes = (*notes, losses.OTHERS)
        gradient = _own_gradient(outputs.own_loss, parts, terms)
        return Loss(outputs.own_loss.detach(), gradient, terms, lambda o: o.own_loss, separable, notes=notes)
    # in float32 or better, also for narrower outputs: the gradient of a mean over many terms is small
    detached = [part.detach().to(wide([part])).requires_grad_() for part in parts]
    tree = outputs.with_parts(detached)
    loss = losses.prepare(options.loss, tree, targets, options.loss_terms)
    meant = loss.function if loss.function is not options.loss else prepared.loss
    run = repeated(meant, RandomState([prepared.device]))
    with torch.enable_grad():
        value = run(tree, targets)
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"The loss returned {type(value).__name__}. Expected a tensor of shape ().")
        validation.check_loss(value.shape)
        if not value.requires_grad:
            raise ValueError(
                "The loss does not depend on the outputs. Expected loss(outputs, targets) to be differentiable: do "
                "not detach the outputs or convert them to NumPy."
            )
        grads = torch.autograd.grad(value.sum(), detached, allow_unused=True, materialize_grads=True)

    def of(other: Outputs) -> torch.Tensor:
        return run(other.with_parts([part.to(wide([part])) for part in other.parts]), targets).sum()

    def anew(outputs: Any, targets: Any) -> torch.Tensor:
        prepared.rewind()
        return run(outputs, targets)

    wanted = options.split and options.population is not False
    separable = loss.separable or (wanted and found_separable(loss.function, anew, outputs, targets))
    notes = (*loss.notes, losses.OTHERS) if losses.other_terms(value, detached) else loss.notes
    return Loss(value.detach().sum(), flatten(list(grads)), loss.terms, of, separable, loss.violations, notes)


def repeated(loss: Callable, state: RandomState) -> Callable[[Any, Any], torch.Tensor]:
    """The loss, drawing the same numbers at each call, on targets that it may write to."""

    def run(outputs: Any, targets: Any) -> torch.Tensor:
        with same_randomness(state):
            return loss(outputs, copied(targets))

    return run


def _own_gradient(loss: torch.Tensor, parts: Vector, terms: Any) -> torch.Tensor:
    """dL/df of the model's own loss, in float32 or better.

    The gradient of a mean over n terms is about 1/n, which float16 outputs would round away: it is taken of n L, as far
    as float16 goes.
    """
    if not any(part.dtype == torch.float16 for part in parts):
        return flatten(list(torch.autograd.grad(loss, parts, retain_graph=True)))
    scale = torch.as_tensor(terms, device=loss.device).float().log2().floor().clamp(0, 15).exp2()
    return flatten(list(torch.autograd.grad(loss, parts, scale.to(loss.dtype), retain_graph=True))) / scale


def taken_apart(apart: Apart, dtypes: list, options: Options) -> tuple[Verdict | None, tuple[str, ...]]:
    """How the samples are taken apart, or None and the reason."""
    passes = apart.passes
    if not options.split:
        return None, ()
    if not passes.divisible:
        return None, (
            f"no input runs over the {passes.samples} samples along its first axis: they are not taken apart",
        )
    if not passes.explained:
        return _joint(
            options, "the network draws random numbers, or writes to parameters, in a way that cannot be repeated"
        )
    tolerance = coupling_tolerance(xp, _narrowest(passes.program, dtypes))
    # micro-batches of one sample cannot differ from single samples: pairs can
    found = judge(apart, (options.forward, options.microbatch), tolerance, pairs=options.microbatch == 1)
    if not found.reason:
        return found, general_note(found)
    return _joint(options, f"the samples interact in this network ({found.reason})")


def _joint(options: Options, reason: str) -> tuple[None, tuple[str, ...]]:
    """Samples that are not taken apart."""
    if options.microbatch is not None:
        raise ValueError(
            f"microbatch={options.microbatch} was asked for, but {reason}. Expected independent samples. Leave "
            "microbatch unset, or remove what couples them."
        )
    return None, (f"{reason}: they are not taken apart",)


def _loss_along(passes: Passes, loss: Loss, u: Vector, step: Any) -> torch.Tensor:
    program = passes.program
    with undisturbed([program.device]), torch.no_grad():
        moved = {
            n: (widened(p.detach()) + step * widened(d)).to(p.dtype)
            for (n, p), d in zip(program.parameters.items(), u, strict=True)
        }
        return loss.of(passes.whole(moved))


def _signs(seed: Any, like: torch.Tensor) -> Callable[[int], torch.Tensor]:
    def signs(index: int) -> torch.Tensor:
        state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]
        generator = torch.Generator(like.device).manual_seed(int(state >> 1))
        count = like.numel() // 32 + 1
        words = torch.randint(-(2**31), 2**31, (count,), generator=generator, device=like.device, dtype=torch.int32)
        return F.embedding(words.view(torch.uint8).int(), table).view(-1)[: like.numel()].view(like.shape)

    table = 1 - 2 * (torch.arange(256, device=like.device)[:, None] >> torch.arange(8, device=like.device) & 1)
    table = table.to(like.dtype)  # the eight signs that each byte stands for
    return signs


def _frozen_notes(passes: Passes) -> tuple[str, ...]:
    kinds = {kind for kind, _ in passes.record}
    notes = []
    if "statistics" in kinds:
        notes.append("batch normalisation in training mode keeps this batch's statistics")
    if "mask" in kinds:
        notes.append("dropout keeps one mask for the whole measurement")
    if "draw" in kinds:
        notes.append("random numbers that the network draws are the same ones in the whole measurement")
    return tuple(notes)


def _narrowest(prepared: Program, outputs: list[torch.dtype]) -> torch.dtype:
    """The dtype that decides how far two ways to compute the same thing may differ."""
    device = prepared.device.type
    autocast = [torch.get_autocast_dtype(device)] if torch.is_autocast_enabled(device) else []
    dtypes = [p.dtype for p in prepared.parameters.values()] + outputs + autocast
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
