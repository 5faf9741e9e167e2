"""From a PyTorch model and a batch to the record that the core works on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from array_api_compat import torch as xp

from lnp import batches
from lnp.backends import Options
from lnp.linearization import Linearization, Subset, coupling_tolerance
from lnp.structure import leaves, map_leaves
from lnp_torch import directional, losses, samples
from lnp_torch.apart import Apart, Tapped, Verdict, general_note, judge
from lnp_torch.complex import real
from lnp_torch.huggingface import own_loss_terms, split_batch
from lnp_torch.isolation import undisturbed
from lnp_torch.models import Program, accepts, program
from lnp_torch.outputs import Outputs, flatten, wide, widened
from lnp_torch.passes import Passes, first_pass
from lnp_torch.scaling import at_scale_one
from lnp_torch.taps import Taps

__all__ = ["accepts", "evaluate", "linearize"]

Vector = list[torch.Tensor]


def evaluate(computation: Callable, model: Any, batches: tuple, options: Options, **operands: Any) -> Any:
    """Run the computation on the linearised batches; tensors of shape () become floats, in one transfer."""
    prepared = program(model, options.forward, options.parameters)
    with undisturbed(prepared.modules, [prepared.device]):
        if operands.get("update") is not None:
            operands["update"] = _as_vector(prepared, operands["update"])
        records = [_linearize(prepared, batch, options) for batch in batches]
        result = computation(*records, **operands)
        flags = [violation for record in records for violation in record.violations]
        result, violated = _to_host(result, [flag for flag, _ in flags])
    for flag, (_, message) in zip(violated, flags, strict=True):
        if flag:
            raise ValueError(message)
    return result


def linearize(model: Any, batch: Any, options: Options) -> Linearization:
    """The record for one batch. It keeps the graph of the forward pass alive."""
    prepared = program(model, options.forward, options.parameters)
    with undisturbed(prepared.modules, [prepared.device]):
        return _linearize(prepared, batch, options)


@dataclass(frozen=True)
class _Loss:
    """The loss at the first pass's outputs, and how to compute it at others."""

    value: torch.Tensor
    gradient: torch.Tensor
    terms: Any
    of: Callable[[Outputs], torch.Tensor]
    separable: bool
    violations: tuple = ()
    notes: tuple[str, ...] = ()


def _linearize(prepared: Program, batch: Any, options: Options) -> Linearization:
    inputs, targets = split_batch(batch, options.loss)
    whole = options.microbatch is None
    taps = Taps(prepared.parameters) if whole and options.split else None
    outputs, repeat = first_pass(
        prepared, inputs, options.batch_statistics == "frozen", whole or targets is None, taps or nullcontext()
    )
    parts = outputs.parts
    flat = flatten([part.detach() for part in parts])
    if isinstance(targets, torch.Tensor):
        batches.check_lengths(flat.shape[0], targets.shape)
    loss = _loss(prepared, inputs, outputs, targets, options)
    passes = repeat(flat.shape[0])
    parameters = list(prepared.parameters.values())
    if whole:
        one = [] if taps is None else [Tapped(slice(None), parts, taps)]
        apart = Apart(passes, lambda: one, flat)
        gradients = lambda v: samples.gradients(parts, parameters, v)
    else:
        pull_groups = samples.looped(passes, options.microbatch or flat.shape[0])
        apart = Apart(passes, lambda: _tapped_groups(passes, options.microbatch or flat.shape[0]), flat)
        gradients = lambda v: samples.total(pull_groups, v)
    found, notes = _taken_apart(apart, [part.dtype for part in parts], options)
    cheap = found is not None and not found.general
    both = options.population if options.population is not None else cheap and loss.separable
    pulls = _Pulls(apart, found, gradients, loss.gradient if both else None)
    names = list(prepared.parameters)
    return Linearization(
        xp=xp,
        outputs=flat,
        loss=loss.value,
        loss_gradient=loss.gradient,
        loss_terms=loss.terms,
        vjp=pulls.vjp,
        inner_products=lambda u, w: {n: _dot(a, b) for n, a, b in zip(names, u, w, strict=True)},
        signs=_signs(options.seed, flat),
        jvp=lambda u: _jvp(prepared, passes, u),
        sample_square_norms=None if found is None else pulls.sample_square_norms,
        subset=None if found is None else lambda size: _subset(prepared, passes, found, options, size),
        cheap=cheap,
        group_square_norms=None if whole else lambda v: samples.square_norms(pull_groups, v),
        groups=1 if whole else -(-flat.shape[0] // options.microbatch),
        loss_along=lambda u, step: _loss_along(prepared, passes, loss, u, step),
        separable=loss.separable,
        violations=loss.violations,
        notes=(*_frozen_notes(passes), *loss.notes, *notes),
    )


def _subset(prepared: Program, passes: Passes, verdict: Verdict, options: Options, size: int) -> Subset:
    """Samples drawn at random, with a forward pass of their own once squared norms are asked for."""
    drawn = np.random.default_rng(np.random.SeedSequence((options.seed, passes.samples))).permutation(passes.samples)
    index = torch.as_tensor(np.sort(drawn[:size]), device=prepared.device)
    some = passes.some(index)

    def square_norms(v: torch.Tensor) -> dict[str, torch.Tensor]:
        size = min(options.microbatch or some.samples, some.samples)
        return Apart(some, lambda: _tapped_groups(some, size), v).square_norms(v, verdict)

    return Subset(index, square_norms, lambda u: _jvp(prepared, some, u))


def _tapped_groups(passes: Passes, size: int) -> Iterator[Tapped]:
    """Micro-batches after their forward pass, one in memory at a time."""
    for start in range(0, passes.samples, size):
        rows = slice(start, min(start + size, passes.samples))
        with Taps(passes.program.parameters) as taps:
            parts = passes.part(passes.program.parameters, rows).parts
        yield Tapped(rows, parts, taps)


@dataclass
class _Pulls:
    """Pull-backs that remember the squared norms of the loss gradient's samples, where both will be asked for.

    Attributes
    ----------
    apart:
        The samples.
    verdict:
        How they are taken apart, or None.
    gradients:
        v -> J^T v.
    both:
        The cotangent of which J^T v and the squared norms are wanted, or None.
    """

    apart: Apart
    verdict: Verdict | None
    gradients: Callable[[torch.Tensor], Vector]
    both: torch.Tensor | None
    norms: dict[str, torch.Tensor] | None = None

    def vjp(self, v: torch.Tensor) -> Vector:
        if v is not self.both or self.verdict is None:
            return self.gradients(v)
        self.norms, vector = self.apart.pulled(v, self.verdict)
        return vector

    def sample_square_norms(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        if v is self.both and self.norms is not None:
            return self.norms
        assert self.verdict is not None, "the record offers this only then"
        return self.apart.square_norms(v, self.verdict)


def _loss(prepared: Program, inputs: Any, outputs: Outputs, targets: Any, options: Options) -> _Loss:
    """L, g = dL/df and the number of terms."""
    parts = outputs.parts
    if targets is None:
        if outputs.own_loss is None or not outputs.own_loss.requires_grad:
            raise ValueError(
                "The batch is a dictionary, but the model returned no loss and logits for it. Expected a model that "
                "computes its own loss from labels. Pass (inputs, targets), and loss= if it cannot be inferred."
            )
        terms, notes = own_loss_terms(prepared.modules, inputs, outputs)
        terms = terms if options.loss_terms is None else options.loss_terms
        gradient = _own_gradient(outputs.own_loss, parts, terms)
        return _Loss(outputs.own_loss.detach(), gradient, terms, lambda o: o.own_loss, True, notes=notes)
    # in float32 or better, also for narrower outputs: the gradient of a mean over many terms is small
    detached = [part.detach().to(wide([part])).requires_grad_() for part in parts]
    tree = outputs.with_parts(detached)
    loss = losses.prepare(options.loss, tree, targets, options.loss_terms)
    with torch.enable_grad():
        value = loss.function(tree, targets)
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"The loss returned {type(value).__name__}. Expected a tensor of shape ().")
        batches.check_loss(value.shape)
        if not value.requires_grad:
            raise ValueError(
                "The loss does not depend on the outputs. Expected loss(outputs, targets) to be differentiable: do "
                "not detach the outputs or convert them to NumPy."
            )
        grads = torch.autograd.grad(value.sum(), detached, allow_unused=True, materialize_grads=True)

    def of(other: Outputs) -> torch.Tensor:
        return loss.function(other.with_parts([part.to(wide([part])) for part in other.parts]), targets).sum()

    gradient = flatten(list(grads))
    return _Loss(value.detach().sum(), gradient, loss.terms, of, loss.separable, loss.violations, loss.notes)


def _own_gradient(loss: torch.Tensor, parts: Vector, terms: Any) -> torch.Tensor:
    """dL/df of the model's own loss, in float32 or better.

    The gradient of a mean over n terms is about 1/n, which float16 outputs would round away: it is taken of n L, as far
    as float16 goes.
    """
    if not any(part.dtype == torch.float16 for part in parts):
        return flatten(list(torch.autograd.grad(loss, parts, retain_graph=True)))
    scale = torch.as_tensor(terms, device=loss.device).float().log2().floor().clamp(0, 15).exp2()
    return flatten(list(torch.autograd.grad(loss, parts, scale.to(loss.dtype), retain_graph=True))) / scale


def _taken_apart(apart: Apart, dtypes: list, options: Options) -> tuple[Verdict | None, tuple[str, ...]]:
    """How the samples are taken apart, or None and the reason."""
    passes = apart.passes
    if not options.split:
        return None, ()
    if not passes.divisible:
        return None, (
            f"no input runs over the {passes.samples} samples along its first axis: they are not taken apart",
        )
    tolerance = coupling_tolerance(xp, _narrowest(passes.program, dtypes))
    # micro-batches of one sample cannot differ from single samples: pairs can
    found = judge(apart, (options.forward, options.microbatch), tolerance, pairs=options.microbatch == 1)
    if not found.reason:
        return found, general_note(found)
    if options.microbatch is not None:
        raise ValueError(
            f"microbatch={options.microbatch} was asked for, but the samples interact in this network: "
            f"{found.reason}. Expected independent samples. Leave microbatch unset, or remove what couples them."
        )
    return None, (f"the samples interact in this network ({found.reason}): they are not taken apart",)


def _jvp(prepared: Program, passes: Passes, u: Vector) -> torch.Tensor:
    with undisturbed(prepared.modules, [prepared.device]):
        run = lambda p: passes.whole(p).parts
        forward = lambda vector: [flatten(directional.jvp(run, prepared.parameters, vector)).detach()]
        return at_scale_one(forward, u, prepared.parameters.values())[0]


def _loss_along(prepared: Program, passes: Passes, loss: _Loss, u: Vector, step: Any) -> torch.Tensor:
    with undisturbed(prepared.modules, [prepared.device]), torch.no_grad():
        moved = {
            n: (widened(p.detach()) + step * widened(d)).to(p.dtype)
            for (n, p), d in zip(prepared.parameters.items(), u, strict=True)
        }
        return loss.of(passes.whole(moved))


def _signs(seed: Any, like: torch.Tensor) -> Callable[[int], torch.Tensor]:
    def signs(index: int) -> torch.Tensor:
        state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]
        generator = torch.Generator(like.device).manual_seed(int(state >> 1))
        bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device, dtype=torch.int8)
        return (2 * bits - 1).to(like.dtype)

    return signs


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    dtype = wide([a, b])
    return (a.to(dtype) * b.to(dtype)).sum()


def _as_vector(prepared: Program, update: Any) -> Vector:
    """The user's update as a vector in parameter space, zero for selected parameters that it leaves out."""
    names = list(prepared.parameters)
    given = (
        update
        if isinstance(update, Mapping)
        else dict(zip(names, update, strict=False))
        if len(update) == len(names)
        else {}
    )
    given = {n: real(d) for n, d in given.items()}
    wrong = [n for n, d in given.items() if n not in names or d.shape != prepared.parameters[n].shape]
    if wrong or not given:
        raise ValueError(
            f"update= does not match the model's parameters{f' at {wrong[:4]}' if wrong else ''}. Expected a "
            f"dictionary {{parameter name: tensor of its shape}}, or one tensor for each of the {len(names)} "
            "parameters in their order."
        )
    return [given[n].detach() if n in given else torch.zeros_like(p) for n, p in prepared.parameters.items()]


def _to_host(result: Any, flags: list[torch.Tensor]) -> tuple[Any, list[bool]]:
    """Every tensor of shape () as a Python number, in one transfer."""
    single = lambda leaf: isinstance(leaf, torch.Tensor) and not leaf.ndim
    tensors = [leaf for leaf in leaves(result) if single(leaf)] + flags
    if not tensors:
        return result, []
    dtype = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    values = torch.stack([tensor.detach().to(dtype) for tensor in tensors]).tolist()
    numbers = iter([v if t.is_floating_point() else int(v) for v, t in zip(values, tensors, strict=True)])
    result = map_leaves(lambda leaf: next(numbers) if single(leaf) else leaf, result)
    return result, [bool(number) for number in numbers]


def _frozen_notes(passes: Passes) -> tuple[str, ...]:
    kinds = {kind for kind, _ in passes.record}
    notes = []
    if "statistics" in kinds:
        notes.append("batch normalisation in training mode keeps this batch's statistics")
    if "mask" in kinds:
        notes.append("dropout keeps one mask for the whole measurement")
    return tuple(notes)


def _narrowest(prepared: Program, outputs: list[torch.dtype]) -> torch.dtype:
    """The dtype that decides how far two ways to compute the same thing may differ."""
    device = prepared.device.type
    autocast = [torch.get_autocast_dtype(device)] if torch.is_autocast_enabled(device) else []
    dtypes = [p.dtype for p in prepared.parameters.values()] + outputs + autocast
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
