"""The record that the core works on, for one batch. Safe to trace and compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lnp import batches
from lnp.backends import Options
from lnp.linearization import Linearization, Subset
from lnp.losses import separable
from lnp_jax import losses, parts
from lnp_jax.apart import Verdict, impossible, pair
from lnp_jax.models import Arrays, Structure
from lnp_jax.network import Network, prepared
from lnp_jax.outputs import parts as parts_of
from lnp_jax.outputs import rebuild
from lnp_jax.separable import found_separable
from lnp_jax.tapped import Tapped, general_note, tapped

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


Pull = Callable[[jax.Array], tuple[Mapping, Mapping | None]]


@dataclass(frozen=True)
class _Passes:
    """Passes forward and back.

    Attributes
    ----------
    outputs:
        f, shape (N, K).
    run:
        parameters -> f.
    pull:
        v -> (J^T v, {name: (N,) array of ||J_nl^T v_n||^2} or None).
    again:
        () -> the same of another forward pass, for a loop; or None.
    """

    outputs: jax.Array
    run: Callable[[Mapping], jax.Array]
    pull: Pull
    again: Callable[[], Pull] | None = None


@dataclass
class _Pulls:
    """Pull-backs, remembered for the loss gradient; inside a loop, of the pass that was made for it.

    Outside a loop XLA computes again what is cheap instead of keeping it between forward and backward pass. A loop
    would make it keep everything, whether the loop is entered or not.
    """

    passes: _Passes
    g: jax.Array
    of_g: tuple[Mapping, Mapping | None]
    inside: Pull | None = None

    def __call__(self, v: jax.Array) -> tuple[Mapping, Mapping | None]:
        return self.of_g if v is self.g else (self.inside or self.passes.pull)(v)

    def square_norms(self, v: jax.Array) -> Mapping:
        """Of single samples, where they are taken apart."""
        return self(v)[1] or {}

    def while_loop(self, going: Callable, body: Callable, state: Any) -> Any:
        """`jax.lax.while_loop`, with a forward pass of its own if it is entered."""
        entered = going(state)

        def loop(state: Any) -> Any:
            outside = self.inside
            self.inside = outside or (None if self.passes.again is None else self.passes.again())
            try:
                return jax.lax.while_loop(going, body, state)
            finally:
                self.inside = outside

        state = jax.tree.map(jnp.asarray, state)
        if isinstance(entered, bool):
            return loop(state) if entered else state
        return jax.lax.cond(entered, loop, lambda state: state, state)


def record(
    structure: Structure, arrays: Arrays, batch: Any, seed: Any, options: Options, verdict: Verdict | None
) -> Linearization:
    """Linearise the model on a batch. Without a verdict two samples are compared; numbers are nan if they differ."""
    inputs, targets = batches.unpack(batch)
    net = prepared(structure, arrays, inputs, options)
    check = verdict is None and options.split
    reason = "" if not options.split else impossible(net) if verdict is None else verdict.reason
    if reason and options.microbatch is not None:
        raise ValueError(
            f"microbatch={options.microbatch} was asked for, but {reason}. Expected independent samples. Leave "
            "microbatch unset, or remove what couples them."
        )
    taken_apart = options.split and not reason
    taps = None if not taken_apart else _taps(net, options, verdict or Verdict())
    passes = _whole(net) if taps is None else _tapped(net, taps, options.microbatch)
    loss = _loss(passes.outputs, _tree(net), targets, options)
    g = loss.gradient
    pull = _Pulls(passes, g, passes.pull(g))
    micro = None if options.microbatch is None else parts.Micro(net.function, net.split, options.microbatch)
    parameters = net.parameters
    return Linearization(
        xp=jnp,
        outputs=passes.outputs,
        loss=loss.value,
        loss_gradient=g,
        loss_terms=loss.terms,
        vjp=lambda v: pull(v)[0],
        inner_products=lambda u, w: {name: jnp.sum(parts.wide(u[name]) * parts.wide(w[name])) for name in parameters},
        signs=_signs(seed, passes.outputs),
        jvp=lambda u: jax.jvp(passes.run, (dict(parameters),), (_as(u, parameters),))[1],
        sample_square_norms=None if taps is None else pull.square_norms,
        subset=None if taps is None else lambda size: _subset(net, taps, options.microbatch, seed, size),
        cheap=taps is not None and not taps.plan.general,
        coupled=pair(net, taps, passes.outputs) if check and taps is not None else None,
        group_square_norms=None if micro is None else lambda v: micro.square_norms(parameters, v),
        groups=1 if micro is None else micro.groups,
        loss_along=lambda u, step: loss.of(
            passes.run({n: p + (step * u[n]).astype(p.dtype) for n, p in parameters.items()})
        ),
        separable=loss.separable,
        violations=loss.violations,
        notes=(*net.notes, *([reason] if reason else []), *loss.notes, *(general_note(taps.plan) if taps else ())),
        while_loop=pull.while_loop,
    )


def loss_and_gradient(
    structure: Structure, arrays: Arrays, batch: Any, options: Options
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """(L, J^T g) of the batch as a whole."""
    inputs, targets = batches.unpack(batch)
    net = prepared(structure, arrays, inputs, options)
    passes = _whole(net)
    loss = _loss(passes.outputs, _tree(net), targets, options)
    return loss.value, passes.pull(loss.gradient)[0]


def _taps(net: Network, options: Options, verdict: Verdict) -> Tapped:
    samples = min(options.microbatch or net.split.samples, net.split.samples)
    return tapped(net.function, net.split, net.parameters, samples, verdict.excluded)


def _whole(net: Network) -> _Passes:
    run = jax.jit(net.whole)  # for eager callers: one program, not one per operation
    outputs, pullback = jax.vjp(run, dict(net.parameters))
    return _Passes(outputs, run, lambda v: (pullback(v)[0], None))


def _tapped(net: Network, taps: Tapped, size: int | None) -> _Passes:
    if size is None:
        outputs, pull = taps.forward(net.split.rows)
        again = lambda: taps.forward(net.split.rows)[1]
        return _Passes(outputs, lambda p: taps.plain(p, net.split.rows), pull, again)
    micro = parts.Micro(net.function, net.split, size)
    part = lambda arrays: taps.forward(arrays[:-1])[1](arrays[-1])
    return _Passes(
        micro.outputs(net.parameters), micro.outputs, lambda v: micro.visited(part, [*net.split.rows, v])
    )  # fmt: skip


def _subset(net: Network, taps: Tapped, microbatch: int | None, seed: Any, size: int) -> Subset:
    """Samples drawn at random, with a forward pass of their own."""
    drawn = jax.random.permutation(jax.random.fold_in(_key(seed), DRAWN), net.split.samples)
    index = jnp.sort(drawn[:size])
    some = replace(net, split=net.split.some(index, size))
    passes = _tapped(some, taps, microbatch)
    return Subset(
        index,
        lambda v: passes.pull(v)[1] or {},
        lambda u: jax.jvp(passes.run, (dict(net.parameters),), (_as(u, net.parameters),))[1],
    )


def _tree(net: Network) -> Any:
    """The outputs' structure, with the leaves that are not measured."""
    floating = len(parts_of(net.tree)) == len(jax.tree.leaves(net.tree))
    return net.tree if floating else net.function(net.parameters, net.inputs)


def _loss(outputs: jax.Array, tree: Any, targets: Any, options: Options) -> _Loss:
    """L and dL/df."""
    targets = jax.tree.map(jnp.asarray, targets)
    if hasattr(targets, "shape"):
        batches.check_lengths(outputs.shape[0], targets.shape)
    made = rebuild(outputs, tree)
    function, terms, violations, notes = losses.prepare(options.loss, made, targets, options.loss_terms)

    def of(flat: jax.Array) -> jax.Array:
        value = jnp.asarray(function(rebuild(flat, tree), targets))
        batches.check_loss(value.shape)
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
