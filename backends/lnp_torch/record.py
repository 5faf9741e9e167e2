"""From a PyTorch model and a batch to the record that the core works on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from array_api_compat import torch as xp

from lnp.contract.linearization import GradientPass, Linearization, Subset, Vector, unit
from lnp.contract.options import Options
from lnp.contract.trees import map_leaves
from lnp.estimators.signs import Signs
from lnp_torch import fallback, forward_mode
from lnp_torch.averages import Averages
from lnp_torch.float16 import at_scale_one
from lnp_torch.in_pieces import first_in_pieces, length_of
from lnp_torch.look import Look
from lnp_torch.loss_gradient import LossAt, loss_at
from lnp_torch.model import Program
from lnp_torch.outputs import Outputs, dot, flatten, square_norm, widened
from lnp_torch.own_loss import shown_mean, split_batch
from lnp_torch.plans import Plan
from lnp_torch.replay import Passes, first_pass, without_graph
from lnp_torch.signs import signs_of
from lnp_torch.state_guard import RandomState, undisturbed
from lnp_torch.taken_apart import compared_elsewhere, plan_and_look, tolerance_of
from lnp_torch.taps.backward_pass import Samples, Tapped, in_groups
from lnp_torch.taps.function_mode import Taps
from lnp_torch.taps.reader import Reading

WORTH = {"cpu": 2**27}
"""Multiplications of a forward pass from which on one over some of the samples pays: below, Python takes as long."""
WORTH_ELSEWHERE = 2**34
WRITES = "the network writes to {} while it runs: derivatives are at the values that it leaves there, as in training"


@dataclass(frozen=True)
class Operators:
    """Products with the Jacobian of one batch.

    Attributes
    ----------
    samples:
        The batch.
    plan, look:
        How its samples are taken apart, and what was seen of them since; None where they are not.
    gradients:
        v -> J^T v, in the order of the parameters.
    loss_gradient:
        g, (N, K).
    options:
        What the user asked for.
    signs:
        Of probes.
    """

    samples: Samples
    plan: Plan | None
    look: Look | None
    gradients: Callable[[torch.Tensor], Vector]
    loss_gradient: torch.Tensor
    options: Options
    signs: Signs

    @property
    def passes(self) -> Passes:
        """Of the batch."""
        return self.samples.passes

    def gradient_pass(self, per_sample: bool, products: int, vector: bool) -> GradientPass:
        """What one backward pass of the loss gradient yields; of a whole batch one parameter's gradient at a time."""
        every, whole = list(self.passes.program.parameters), self.options.microbatch is None
        g, magnitude = unit(xp, self.loss_gradient)
        if not (per_sample or whole):
            u = self.gradients(g)
            return GradientPass({name: square_norm(part) for name, part in u.items()}, vector=u, magnitude=magnitude)
        index, norms = None, None
        if per_sample and self.plan is not None and self.look is not None:
            # the taps have the factors of all parameters at hand, if none takes the general way
            index = self.signs.drawn(products) if products and whole and not self.plan.general else None
            kept = vector or not whole or (products > 0 and index is None)
            with self.look.running():
                reading = self.plan.reading(gradient_norms=whole, index=index)
                found = self.samples.pulled(g, self.plan, reading, every if kept else (), self.look.outputs)
            norms = found.square_norms
        else:
            reading = Reading(frozenset(every), gradient_norms=True)
            found = self.samples.tapped(g, reading, every if vector else ())
        of_gradient = found.gradient_norms or {name: square_norm(part) for name, part in found.gradient.items()}
        if found.missing:  # the products lack what these parameters add
            found, index = replace(found, products=None), None
        return GradientPass(of_gradient, norms, found.products, index, found.gradient or None, magnitude)

    def square_norms(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """{name: (1,) array of ||J_l^T v||^2}, one parameter's gradient at a time."""
        reading = Reading(frozenset(self.passes.program.parameters), gradient_norms=True)
        return {name: norm.reshape(1) for name, norm in self.samples.tapped(v, reading).gradient_norms.items()}

    def sample_square_norms(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """{name: (N,) array of ||J_nl^T v_n||^2}."""
        return self._looked_at(lambda: self.samples, None, v)

    def subset(self, size: int) -> Subset:
        """Samples drawn at random, with a forward pass of their own once squared norms are asked for."""
        assert self.look is not None, "it comes with a plan, and the record offers this only then"
        look, index, group = self.look, self.signs.drawn(size), min(self.options.microbatch or size, size)

        def some() -> Samples:
            return in_groups(self.passes.some(index), group, self.samples.outputs[index])

        def forward(u: Vector) -> torch.Tensor:
            passes = self.passes.some(index)
            with look.running():
                return torch.cat([jvp(passes.some(slice(s, s + group)), u) for s in range(0, size, group)])

        return Subset(index, lambda v: self._looked_at(some, index, v), forward)

    def _looked_at(
        self, samples: Callable[[], Samples], index: torch.Tensor | None, v: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """{name: (M,) squared norms} of the samples of an index, or of all; what ran apart is held against the batch,
        in the first pass over them, which all others repeat.
        """
        assert self.plan is not None, "the record offers this only then"
        assert self.look is not None, "it comes with a plan"
        plan, look, first = self.plan, self.look, self.look.is_first(index)

        def watch(rows: slice, outputs: torch.Tensor) -> None:
            look.outputs(rows if index is None else index[rows], outputs)

        with look.running():
            found = samples().pulled(v, plan, plan.reading(), watch=watch if first else None)
        look.square_norms(index, v, found.square_norms)
        return found.square_norms


def record(prepared: Program, batch: Any, options: Options, reason: str = "") -> tuple[Linearization, Look | None]:
    """(The record of a batch, what looks at its samples where they are taken apart); `reason` is why they are not."""
    inputs, targets = split_batch(batch, options.loss)
    # what was made in inference mode can take no part in a derivative
    targets = map_leaves(lambda t: t.clone() if isinstance(t, torch.Tensor) and t.is_inference() else t, targets)
    whole = options.microbatch is None
    begun, away = RandomState([prepared.device]), None
    loss, outputs, passes, taps, differing = first_loss(prepared, inputs, targets, options)
    if taps is not None and not reason:
        unknown = compared_elsewhere(passes, outputs.parts, taps, options)
        if unknown is not None:  # the comparison has a graph of its own: this one is made again after it
            del loss, outputs, passes, taps
            away = unknown()
            begun.restore()
            loss, outputs, passes, taps, differing = first_loss(prepared, inputs, targets, options)
    parts = outputs.parts
    flat = flatten([part.detach() for part in parts])
    if whole:
        one = [] if taps is None else [Tapped(slice(0, flat.shape[0]), parts, taps)]
        samples = Samples(passes, lambda: one, flat, apart=False)
        gradients = graph_gradients(parts, prepared.parameters)
    else:
        size = options.microbatch or flat.shape[0]
        pull_groups = fallback.looped(passes, size)
        samples = in_groups(passes, size, flat)
        gradients = partial(fallback.total, pull_groups)
    plan, look, notes = plan_and_look(samples, gradients, parts, loss.gradient, options, (reason, away))
    if targets is None and plan is not None and options.population is not False:
        tolerance = tolerance_of(prepared, parts)
        loss = replace(loss, separable=shown_mean(passes, loss.gradient, loss.terms, tolerance, options.seed))
    signs = signs_of(options.seed, flat, parts)
    made = linearization(Operators(samples, plan, look, gradients, loss.gradient, options, signs), loss, taps)
    if not whole:
        norms = partial(fallback.square_norms, pull_groups)
        made = replace(made, group_square_norms=norms, groups=-(-flat.shape[0] // size))
    return replace(made, notes=(*made.notes, *differing, *notes)), look


def first_loss(
    prepared: Program, inputs: Any, targets: Any, options: Options
) -> tuple[LossAt, Outputs, Passes, Taps | None, tuple[str, ...]]:
    """The loss and the measured outputs of the first pass, the passes that repeat it, what watched it, and notes.

    With micro-batches a piece is in memory at a time, where the network and its loss allow it.
    """
    size = options.microbatch
    if size is not None:
        pieces = first_in_pieces(prepared, inputs, targets, options, partial(tolerance_of, prepared))
        if pieces is not None:
            return *pieces, None, ()
    watching: Callable = nullcontext
    if size is None and options.split:
        watching = partial(Taps, prepared.parameters, samples=length_of(inputs))
    averages = Averages() if targets is None else None
    with averages or nullcontext():
        keep_graph = size is None or targets is None
        frozen = options.batch_statistics == "frozen"
        outputs, repeat, watch, differing = first_pass(prepared, inputs, frozen, keep_graph, watching)
    loss, outputs = loss_at(prepared, outputs, targets, options, averages)
    return loss, outputs, repeat(outputs), watch if isinstance(watch, Taps) else None, differing


def graph_gradients(parts: list[torch.Tensor], parameters: Vector) -> Callable[[torch.Tensor], Vector]:
    """v -> J^T v by backward passes on a graph that is kept."""
    names, leaves = list(parameters), list(parameters.values())
    return lambda v: dict(zip(names, fallback.gradients(parts, leaves, v), strict=True))


def linearization(operators: Operators, loss: LossAt, taps: Taps | None) -> Linearization:
    """The record of products with the Jacobian and a loss."""
    passes, look, options = operators.passes, operators.look, operators.options
    flat, apart = operators.samples.outputs, operators.plan is not None
    return Linearization(
        xp=xp,
        outputs=flat,
        loss=loss.value,
        loss_gradient=loss.gradient,
        loss_terms=loss.terms,
        vjp=operators.gradients,
        gradient_pass=operators.gradient_pass if taps is not None or options.microbatch is not None else None,
        inner_products=inner_products,
        group_square_norms=operators.square_norms if taps is not None else None,
        signs=operators.signs,
        jvp=lambda u: jvp(passes, u),
        sample_square_norms=operators.sample_square_norms if apart else None,
        subset=operators.subset if apart else None,
        subset_pays=taps is None or taps.products > WORTH.get(flat.device.type, WORTH_ELSEWHERE),
        sample_cost=1.0 if operators.plan is None else operators.plan.sample_cost(len(flat)),
        coupled=None if look is None else look.coupled,
        loss_along=lambda u, step: _loss_along(passes, loss, u, step),
        separable=loss.separable,
        sample_terms=loss.sample_terms,
        sample_losses=None if loss.alone is None else partial(loss.alone, passes),
        violations=loss.violations,
        notes=(*_frozen_notes(passes), *loss.notes),
        **loss.told,
    )


def inner_products(u: Vector, w: Vector) -> Vector:
    """{parameter: <u, w>}."""
    if u is w:
        return {name: square_norm(part) for name, part in u.items()}
    return {name: dot(u[name], w[name]) for name in u}


def jvp(passes: Passes, u: Vector) -> torch.Tensor:
    """J u, (N, K)."""
    parameters = passes.program.parameters

    def forward(vector: list[torch.Tensor]) -> list[torch.Tensor]:
        run = forward_mode.double_backward if passes.program.written else forward_mode.jvp  # a write moves tangents
        return [flatten(run(lambda p: passes.whole(p).parts, parameters, vector)).detach()]

    with undisturbed([passes.program.device]):
        return at_scale_one(forward, [u[name] for name in parameters], parameters.values())[0]


def _loss_along(passes: Passes, loss: LossAt, u: Vector, step: Any) -> torch.Tensor:
    """L at the parameters plus step * u, shape ()."""
    program = passes.program
    with undisturbed([program.device]):
        moved = {
            name: (widened(p.detach()) + step * widened(u[name])).to(p.dtype) for name, p in program.parameters.items()
        }
        return loss.at(without_graph(passes.whole, moved))


def _frozen_notes(passes: Passes) -> tuple[str, ...]:
    """What the passes of a measurement keep from the first one."""
    notes = {
        "statistics": "batch normalisation in training mode keeps this batch's statistics",
        "mask": "dropout keeps one mask for the whole measurement",
        "draw": "random numbers that the network draws are the same ones in the whole measurement",
    }
    found = [note for kind, note in notes.items() if kind in dict(passes.record)]
    return (*found, *([WRITES.format(", ".join(passes.program.written))] if passes.program.written else []))
