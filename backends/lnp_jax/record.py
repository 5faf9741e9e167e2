"""The record that the core works on, for one batch. Safe to trace and compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lnp.contract import validation
from lnp.contract.linearization import Linearization, Subset
from lnp.contract.options import Options
from lnp.estimators.population import jackknife_size
from lnp.losses.kinds import separable
from lnp_jax import fallback, losses
from lnp_jax.apart import Verdict, apart, impossible, pair
from lnp_jax.bound_model import Network, has_rules, prepared
from lnp_jax.model import Arrays, Structure
from lnp_jax.outputs import flatten, rebuild
from lnp_jax.outputs import parts as parts_of
from lnp_jax.passes import SamplePasses, of_batch, of_samples, while_loop
from lnp_jax.separable import found_separable
from lnp_jax.state_guard import replayed
from lnp_jax.taps.backward_pass import Tapped, general_note, tapped
from lnp_jax.taps.primitives import inner

DRAWN = 2**31 - 1
"""Folded into the key for the samples of a subset; probes count from 0."""


@dataclass(frozen=True)
class _Loss:
    value: jax.Array
    gradient: jax.Array
    of: Callable[[jax.Array], jax.Array]
    terms: Any
    separable: bool
    violations: tuple
    notes: tuple[str, ...]


def record(
    structure: Structure, arrays: Arrays, batch: Any, seed: Any, options: Options, verdict: Verdict | None
) -> Linearization:
    """Linearise the model on a batch. Without a verdict two samples are compared; numbers are nan if they differ."""
    inputs, targets = validation.unpack(batch)
    net = prepared(structure, arrays, inputs, options)
    check = verdict is None and options.split
    reason = "" if not options.split else impossible(net) if verdict is None else verdict.reason
    if reason and options.microbatch is not None:
        raise ValueError(
            f"microbatch={options.microbatch} was asked for, but {reason}. Expected independent samples. Leave "
            "microbatch unset, or remove what couples them."
        )
    taps = _taps(net, options, verdict or Verdict()) if options.split and not reason else None
    micro = None if options.microbatch is None else fallback.Micro(net.function, net.split, options.microbatch)
    batch_passes = of_batch(net, micro)
    loss = _loss(batch_passes.outputs, _tree(net), targets, options)
    g = loss.gradient
    gradient = batch_passes.pull(g)
    chosen = lambda size: _drawn(seed, net.split.samples, size)
    by_taps = taps is not None and has_rules(taps.program.jaxpr)  # without forward mode
    index = chosen(jackknife_size(net.split.samples)) if by_taps else None
    samples = None if taps is None else of_samples(net, taps, micro, g, index)
    parameters = net.parameters
    return Linearization(
        xp=jnp,
        outputs=batch_passes.outputs,
        loss=loss.value,
        loss_gradient=g,
        loss_terms=loss.terms,
        vjp=lambda v: gradient if v is g else batch_passes.pull(v),
        inner_products=lambda u, w: {
            name: jnp.sum(fallback.wide(u[name]) * fallback.wide(w[name])) for name in parameters
        },
        signs=_signs(seed, batch_passes.outputs),
        jvp=lambda u: jax.jvp(batch_passes.run, (dict(parameters),), (_as(u, parameters),))[1],
        sample_square_norms=None if samples is None else samples.square_norms,
        subset=None
        if not (taps and samples)
        else lambda size: _subset(net, taps, micro, chosen(size), gradient, samples),
        cheap=taps is not None and not taps.plan.general,
        coupled=None if taps is None or samples is None else _coupled(net, taps, samples, batch_passes.outputs, check),
        group_square_norms=None if micro is None else lambda v: micro.square_norms(parameters, v),
        groups=1 if micro is None else micro.groups,
        loss_along=lambda u, step: loss.of(
            batch_passes.run({n: p + (step * u[n]).astype(p.dtype) for n, p in parameters.items()})
        ),
        separable=loss.separable,
        violations=loss.violations,
        notes=(*net.notes, *([reason] if reason else []), *loss.notes, *(general_note(taps.plan) if taps else ())),
        while_loop=while_loop if samples is None else samples.while_loop,
    )


def _taps(net: Network, options: Options, verdict: Verdict) -> Tapped:
    samples = min(options.microbatch or net.split.samples, net.split.samples)
    return tapped(net.function, net.split, net.parameters, samples, verdict.excluded)


def _coupled(net: Network, taps: Tapped, samples: SamplePasses, outputs: jax.Array, check: bool) -> jax.Array:
    """Whether the samples give other outputs on their own than in the batch, shape (); with `check` also whether two of
    them interact in the gradient, or taps are wrong.
    """
    differ = apart(samples.outputs, outputs) > net.tolerance(taps.program)
    return differ | pair(net, taps, outputs) if check else differ


def _drawn(seed: Any, samples: int, size: int) -> jax.Array:
    """Samples drawn at random, in the batch's order; the same ones at each call."""
    return jnp.sort(jax.random.permutation(jax.random.fold_in(_key(seed), DRAWN), samples)[:size])


def _subset(
    net: Network, taps: Tapped, micro: fallback.Micro | None, index: jax.Array, gradient: Mapping, samples: SamplePasses
) -> Subset:
    """These samples, with a forward pass of their own where one is asked for."""
    some = replace(net, split=net.split.some(index, len(index)))
    few = None if micro is None else replace(micro, split=some.split)
    inputs = some.split.inputs(some.split.rows)
    run = few.outputs if few is not None else lambda p: flatten(net.function(p, inputs))

    def jvp(u: Mapping) -> jax.Array:
        return jax.jvp(run, (dict(net.parameters),), (_as(u, net.parameters),))[1]

    def square_norms(v: jax.Array) -> Mapping:
        return of_samples(some, taps, few, v, None).of_g

    def along(u: Mapping) -> jax.Array:
        return samples.along if u is gradient else inner(samples.g[index], jvp(u))

    known = samples.along is not None and len(samples.along) == len(index)
    return Subset(index, square_norms, jvp, along if known else None)


def _tree(net: Network) -> Any:
    """The outputs' structure, with the leaves that are not measured."""
    floating = len(parts_of(net.tree)) == len(jax.tree.leaves(net.tree))
    return net.tree if floating else net.function(net.parameters, net.inputs)


def _loss(outputs: jax.Array, tree: Any, targets: Any, options: Options) -> _Loss:
    """L and dL/df."""
    targets = jax.tree.map(jnp.asarray, targets)
    if hasattr(targets, "shape"):
        validation.check_lengths(outputs.shape[0], targets.shape)
    made = rebuild(outputs, tree)
    prepare = replayed(losses.prepare, options.loss)
    meant, terms, violations, notes = prepare(options.loss, made, targets, options.loss_terms)
    function = replayed(meant)

    def of(flat: jax.Array) -> jax.Array:
        value = jnp.asarray(function(rebuild(flat, tree), targets))
        validation.check_loss(value.shape)
        return jnp.sum(value).astype(flat.dtype)

    value, gradient = jax.value_and_grad(of)(outputs)
    wanted = options.split and options.population is not False
    known = separable(options.loss) or (wanted and found_separable(function, made, targets))
    return _Loss(value, gradient, of, terms, known, violations, notes)


def _signs(seed: Any, outputs: jax.Array) -> Callable[[Any], jax.Array]:
    key, (samples, numbers) = _key(seed), outputs.shape

    def signs(index: Any) -> jax.Array:
        """One bit for each: drawing whole numbers takes as long as a product of matrices."""
        words = jax.random.bits(jax.random.fold_in(key, index), (samples, -(-numbers // 32)), jnp.uint32)
        bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        return 2 * bits.reshape(samples, -1)[:, :numbers].astype(outputs.dtype) - 1

    return signs


def _key(seed: Any) -> jax.Array:
    seed = jnp.asarray(seed)
    if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        return seed
    return jax.random.wrap_key_data(seed) if seed.ndim else jax.random.key(seed)


def _as(u: Mapping, parameters: Mapping) -> dict[str, jax.Array]:
    return {name: u[name].astype(p.dtype) for name, p in parameters.items()}
