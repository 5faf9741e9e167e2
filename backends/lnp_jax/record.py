"""The record that the core works on, for one batch. Safe to trace and compile."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from lnp import batches
from lnp.backends import Options
from lnp.linearization import Linearization, Subset
from lnp.losses import separable
from lnp.population import jackknife_size
from lnp_jax import losses, parts
from lnp_jax.apart import Verdict, impossible, pair
from lnp_jax.models import Arrays, Structure
from lnp_jax.network import Network, prepared
from lnp_jax.outputs import parts as parts_of
from lnp_jax.outputs import rebuild
from lnp_jax.separable import found_separable
from lnp_jax.tapped import Pulled, Tapped, general_note, tapped
from lnp_jax.taps import inner

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


Pull = Callable[[jax.Array], Pulled]


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
        v -> J^T v, and what taps tell besides.
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
    would make it keep everything, whether the loop is entered or not. What may be run once is no loop.
    """

    passes: _Passes
    g: jax.Array
    of_g: Pulled
    inside: Pull | None = None

    def __call__(self, v: jax.Array) -> Pulled:
        return self.of_g if v is self.g else (self.inside or self.passes.pull)(v)

    def square_norms(self, v: jax.Array) -> Mapping:
        """Of single samples, where they are taken apart."""
        return self(v).norms or {}

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

        arrays = jax.tree.map(jnp.asarray, state)
        if isinstance(entered, bool):
            return loop(arrays) if entered else arrays
        once = isinstance(state[0], int) and state[0] == 0 and _ends_after_one(going, state)
        return jax.lax.cond(entered, body if once else loop, lambda arrays: arrays, arrays)


def _ends_after_one(going: Callable, state: tuple) -> bool:
    """Whether a loop that counts in state[0] is over at 1, whatever it finds: its condition is false then, whichever
    values the flags have that it takes from outside.
    """
    program = jax.make_jaxpr(lambda: going((1, *state[1:])))()
    if any(jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.bool_) for value in program.consts):
        return False
    with jax.ensure_compile_time_eval():
        choices = itertools.product(map(jnp.asarray, (False, True)), repeat=len(program.consts))
        return not any(core.jaxpr_as_fun(core.ClosedJaxpr(program.jaxpr, flags))()[0] for flags in choices)


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
    samples = net.split.samples
    chosen = lambda size: _drawn(seed, samples, size)
    passes = (
        _whole(net) if taps is None else _tapped(net, taps, options.microbatch, chosen(jackknife_size(samples)))
    )  # fmt: skip
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
        vjp=lambda v: pull(v).gradient,
        inner_products=lambda u, w: {name: jnp.sum(parts.wide(u[name]) * parts.wide(w[name])) for name in parameters},
        signs=_signs(seed, passes.outputs),
        jvp=lambda u: jax.jvp(passes.run, (dict(parameters),), (_as(u, parameters),))[1],
        sample_square_norms=None if taps is None else pull.square_norms,
        subset=None if taps is None else lambda size: _subset(net, taps, options.microbatch, chosen(size), pull),
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
    return loss.value, passes.pull(loss.gradient).gradient


def _taps(net: Network, options: Options, verdict: Verdict) -> Tapped:
    samples = min(options.microbatch or net.split.samples, net.split.samples)
    return tapped(net.function, net.split, net.parameters, samples, verdict.excluded)


def _whole(net: Network) -> _Passes:
    run = jax.jit(net.whole)  # for eager callers: one program, not one per operation
    outputs, pullback = jax.vjp(run, dict(net.parameters))
    return _Passes(outputs, run, lambda v: Pulled(pullback(v)[0]))


def _tapped(net: Network, taps: Tapped, size: int | None, index: jax.Array | None = None) -> _Passes:
    rows = net.split.rows
    if size is None:
        outputs, pull = taps.forward(rows, index)
        return _Passes(outputs, lambda p: taps.plain(p, rows), pull, lambda: taps.forward(rows)[1])
    micro = parts.Micro(net.function, net.split, size)

    def part(arrays: list) -> tuple[Mapping, Mapping | None]:
        pulled = taps.forward(arrays[:-1])[1](arrays[-1])
        return pulled.gradient, pulled.norms

    return _Passes(micro.outputs(net.parameters), micro.outputs, lambda v: Pulled(*micro.visited(part, [*rows, v])))


def _drawn(seed: Any, samples: int, size: int) -> jax.Array:
    """Samples drawn at random, in the batch's order; the same ones at each call."""
    return jnp.sort(jax.random.permutation(jax.random.fold_in(_key(seed), DRAWN), samples)[:size])


def _subset(net: Network, taps: Tapped, microbatch: int | None, index: jax.Array, pulls: _Pulls) -> Subset:
    """These samples, with a forward pass of their own where one is asked for."""
    some = replace(net, split=net.split.some(index, len(index)))
    of_g = pulls.of_g

    def jvp(u: Mapping) -> jax.Array:
        return jax.jvp(_tapped(some, taps, microbatch).run, (dict(net.parameters),), (_as(u, net.parameters),))[1]

    def along(u: Mapping) -> jax.Array:
        return of_g.along if u is of_g.gradient and of_g.along is not None else inner(pulls.g[index], jvp(u))

    known = of_g.along is not None and len(of_g.along) == len(index)
    return Subset(
        index, lambda v: _tapped(some, taps, microbatch).pull(v).norms or {}, jvp, along if known else None
    )  # fmt: skip


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
