"""The record that the core works on, for one batch. Safe to trace and compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lnp.contract import validation
from lnp.contract.linearization import (
    MAPPED_COST,
    Array,
    GradientPass,
    Linearization,
    Subset,
    Vector,
    coupling_tolerance,
    unit,
)
from lnp.contract.options import Options
from lnp.losses.evidence import told
from lnp.per_sample import differences, self_check
from lnp.per_sample.verdict import BENT, Verdict
from lnp_jax import fallback, loops, losses, shards
from lnp_jax.bound_model import Network, bind
from lnp_jax.losses import BoundLoss
from lnp_jax.model import Arrays, Structure
from lnp_jax.outputs import parts as parts_of
from lnp_jax.passes import BatchPasses, SamplePasses, batch_passes
from lnp_jax.self_check import NOT_ASKED, WholeBatch, bends, check_single_samples, first_that_runs, pair_differs
from lnp_jax.shards import Devices
from lnp_jax.signs import signs_of
from lnp_jax.taps.backward_pass import tap

NARROW = coupling_tolerance(jnp, jnp.float32)
"""Tolerance beyond which numbers are of half precision: sums over many samples have no digits to compare then."""

# For eager callers each is one program, not one for each operation.
_sums_apart = jax.jit(partial(differences.sums_apart, jnp))
_outputs_apart = jax.jit(partial(self_check.look, jnp))


@dataclass
class _Look:
    """What the samples of a batch have shown of themselves in the passes that ran, in compiled code too.

    Attributes
    ----------
    net, batch, samples:
        The network, and its passes.
    interacting:
        Flags of shape (): True where samples were found to interact.
    """

    net: Network
    batch: BatchPasses
    samples: SamplePasses
    interacting: list[Array] = field(default_factory=list)

    def gradient_pass(self, g: Array, gradient: Vector, of_batch: Mapping[str, Array]) -> GradientPass:
        """The loss gradient pulled back through the samples; of small parameters their sum is held against J^T g."""
        sums, norms = self.samples.loss_gradient(g)
        if sums and self.net.tolerance <= NARROW:
            found = _sums_apart(sums, {name: gradient[name] for name in sums}, norms)
            self.interacting.append(found > self.net.tolerance)
        return GradientPass(of_batch, norms, vector=gradient)

    def coupled(self) -> Array:
        """Whether samples were not what they are in the batch, in outputs or gradients. Shape ()."""
        outputs = self.batch.outputs
        found = _outputs_apart(outputs, self.samples.outputs) <= self.net.tolerance
        flag = jnp.logical_not(found) & jnp.all(jnp.isfinite(outputs))
        for other in self.interacting:
            flag = flag | other
        return flag


def record(
    structure: Structure, arrays: Arrays, batch: Any, seed: Any, options: Options, verdict: Verdict | None
) -> Linearization:
    """Linearise the model on a batch. Without a verdict two samples are compared; numbers are nan if they differ."""
    inputs, targets = validation.unpack(batch)
    net, whole = bind(structure, arrays, inputs, options), shards.devices()
    micro = None if options.microbatch is None else fallback.Micro(net.function, net.split, options.microbatch)
    passes = batch_passes(net, micro)
    look, reason = _samples(net, passes, micro, options, verdict)
    if reason and options.microbatch is not None:
        raise ValueError(
            f"microbatch={options.microbatch} was asked for, but {reason}. Expected independent samples. Leave "
            "microbatch unset, or remove what couples them."
        )
    outputs, targets = whole.joined(passes.outputs), whole.targets(targets, net.split.samples)
    loss = losses.bind(options, replace(net, tree=whole.tree(net.tree)), outputs, targets)
    whole.refuse_talking(net, loss.of, outputs)
    signs = signs_of(seed, outputs, parts_of(whole.tree(net.tree)))
    parameters = passes.parameters
    lin = Linearization(
        xp=jnp,
        outputs=outputs,
        loss=loss.value,
        loss_gradient=loss.gradient,
        loss_terms=loss.prepared.terms,
        vjp=passes.pull,
        inner_products=_inner_products,
        signs=signs,
        jvp=passes.jvp,
        gradient_pass=_gradient_pass(passes, look, loss),
        sample_square_norms=None if look is None else look.samples.square_norms,
        subset=None if look is None else lambda size: _subset(look.samples, signs.drawn(size)),
        sample_cost=1.0 if look is not None and not look.samples.taps.plan.general else MAPPED_COST,
        coupled=None if look is None else look.coupled,
        group_square_norms=None if micro is None else lambda v: micro.square_norms(parameters, v),
        groups=1 if micro is None else micro.groups,
        loss_along=lambda u, step: loss.of(
            whole.joined(passes.run({name: p + (step * u[name]).astype(p.dtype) for name, p in parameters.items()}))
        ),
        separable=loss.separable,
        sample_terms=loss.prepared.sample_terms,
        sample_losses=loss.alone,
        violations=(*loss.prepared.violations, *_bent(net, look, whole, signs, loss, verdict)),
        notes=(*net.notes, *([reason] if reason else []), *loss.prepared.notes, *_notes(look)),
        while_loop=loops.while_loop if look is None else look.samples.while_loop,
        **told(jnp, loss.prepared, loss.gradient),
    )
    return whole.record(lin)


def _samples(
    net: Network, passes: BatchPasses, micro: fallback.Micro | None, options: Options, verdict: Verdict | None
) -> tuple[_Look | None, str]:
    """The samples on their own, or why they are not taken apart; (None, "") where nobody asks for them."""
    if not options.split:
        return None, ""
    if verdict is not None and verdict.reason:
        return None, verdict.reason

    def apart() -> _Look:
        if verdict is None:
            check_single_samples(net)
        size = min(options.microbatch or net.split.samples, net.split.samples)
        taps = tap(net, size, {} if verdict is None else dict(verdict.general))
        look = _Look(net, passes, SamplePasses(net, taps, micro))
        if verdict is None:
            look.interacting.append(pair_differs(net, passes.outputs))
        return look

    return first_that_runs(apart)


def _gradient_pass(
    passes: BatchPasses, look: _Look | None, loss: BoundLoss
) -> Callable[[bool, int, bool], GradientPass]:
    """What the core asks of the backward pass of the loss. Inner products it takes from the subset's forward pass."""

    def gradient_pass(per_sample: bool, products: int, vector: bool) -> GradientPass:
        g, magnitude = unit(jnp, loss.gradient)
        gradient = passes.pull(g)
        square_norms = _inner_products(gradient, gradient)
        if look is None or not per_sample:
            return GradientPass(square_norms, vector=gradient, magnitude=magnitude)
        return replace(look.gradient_pass(g, gradient, square_norms), magnitude=magnitude)

    return gradient_pass


def _bent(
    net: Network, look: _Look | None, whole: Devices, signs: Callable, loss: BoundLoss, verdict: Verdict | None
) -> tuple[tuple[Array, str], ...]:
    """The check whether the backward pass is linear, where somebody wrote it: of one sample, another one at each
    measurement, and of the one that pulls most; of the batch, where samples are not taken apart.
    """
    if not net.custom_backward or verdict == NOT_ASKED:
        return ()
    if verdict is not None and verdict.bent:
        return ((jnp.asarray(True), BENT),)
    g = whole.own(loss.gradient)
    if look is not None:
        return ((bends(net, whole.own(signs(0)), g, loss.value), BENT),)
    return ((self_check.bend_of_batch(WholeBatch(net), g) > net.tolerance, BENT),)


def _notes(look: _Look | None) -> tuple[str, ...]:
    return () if look is None else Verdict(general=tuple(look.samples.taps.plan.general.items())).notes


def _subset(samples: SamplePasses, index: Array) -> Subset:
    """These samples, with forward passes of their own where they are asked for."""
    some = samples.net.some(index, len(index))

    def jvp(u: Vector) -> Array:
        return batch_passes(some, None).jvp(u)

    return Subset(index, lambda v: samples.some(index).square_norms(v), jvp)


@jax.jit
def _inner_products(u: Vector, w: Vector) -> dict[str, Array]:
    """{parameter name: <u_l, w_l>}, in float32 or better."""
    return {name: jnp.sum(fallback.wide(u[name]) * fallback.wide(w[name])) for name in u}
