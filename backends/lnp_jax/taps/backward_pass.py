"""The network as a function of single samples with taps: one forward pass, whose pull-back gives J^T v and the squared
norms of the samples' own gradients together.

For each parameter, where the program uses it decides:

    norm tap       one recognised use: its squared norm is added up in the backward pass, and nothing is kept
    output taps    several uses that add (a tied head, a weight of a recurrent network): cotangents of the outputs
    copy           any other use of a small parameter: zeros for each sample are added to it
    on its own     any other use of a large one: single samples are pulled back, a few at a time
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from lnp.contract.linearization import Vector
from lnp.per_sample import norms, uses
from lnp.per_sample.differences import SquareNorms
from lnp.per_sample.uses import Factors
from lnp_jax import fallback
from lnp_jax.bound_model import Network
from lnp_jax.programs import for_many
from lnp_jax.taps import rules
from lnp_jax.taps.interpreter import FoundUses, Group, Path, Site, Value, Walk
from lnp_jax.taps.primitives import chunked
from lnp_jax.taps.rules import View

COPIED = 2**21
"""Numbers, over all samples, up to which a parameter is copied for each sample."""
ROW = 2**12
"""Numbers of a parameter that is copied in any case: a bias, a scale."""
SUMMED = 2**12
"""Numbers of a parameter whose samples' gradients are summed, to be compared with the batch's: a bias, a gate."""
SUMMED_SHARE = 0.02
"""Of all numbers, how many may belong to weights that are summed too, beyond `SUMMED`: summing them is a product."""

Pull = Callable[[jax.Array], tuple[Vector, SquareNorms]]
"""v (N, K) -> (J^T v, {name: (N,) array of ||J_n^T v_n||^2})."""
Shapes = Mapping[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class Plan:
    """How each parameter is tapped.

    Attributes
    ----------
    lone:
        Groups with a norm tap.
    joined:
        {group: its sites, whose outputs are tapped}.
    copies:
        {piece, or whole parameter, that is copied for each sample: its shape and type}.
    general:
        {parameter whose samples are pulled back on their own: why}.
    """

    lone: tuple[Group, ...] = ()
    joined: Mapping[Group, tuple[Site, ...]] = field(default_factory=dict)
    copies: Mapping[Group, jax.ShapeDtypeStruct] = field(default_factory=dict)
    general: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tapped:
    """A network whose samples do not interact.

    Attributes
    ----------
    net:
        The network on a batch.
    program:
        That of one sample.
    plan:
        How it is tapped.
    """

    net: Network
    program: Any
    plan: Plan

    def forward(self, rows: list) -> tuple[jax.Array, Pull]:
        """(outputs (N, K), what pulls cotangents back) of the samples with these rows."""
        samples = rows[0].shape[0]
        of_all = jax.jit(jax.vmap(self._one, (None, 0, 0)))  # for eager callers: one program
        read = jax.jit(lambda taps, kept: self._norms(taps, kept, samples))

        def with_taps(p: Vector, taps: dict) -> tuple[jax.Array, dict]:
            return of_all(p, taps, rows)

        parameters = dict(self.net.parameters)
        outputs, pullback, kept = jax.vjp(with_taps, parameters, self._taps(samples), has_aux=True)

        def pull(v: jax.Array) -> tuple[Vector, SquareNorms]:
            gradient, taps = pullback(v.astype(outputs.dtype))
            found = read(taps, kept) | self._on_their_own(rows, v)
            return gradient, {name: found[name] for name in parameters}

        return outputs, pull

    @property
    def summed(self) -> tuple[str, ...]:
        """Small parameters whose gradients are there, or cost little, when all samples are pulled back."""
        sizes = {name: p.size for name, p in self.net.parameters.items() if p.size <= SUMMED}
        copied = {name for name, _ in self.plan.copies}
        left, found = max(SUMMED, SUMMED_SHARE * sum(p.size for p in self.net.parameters.values())), []
        for name in sorted(sizes, key=lambda name: (name not in copied, sizes[name])):
            left -= 0 if name in copied else sizes[name]
            if left >= 0:
                found.append(name)
        return tuple(found)

    def _one(self, parameters: Mapping, taps: dict, rows: list) -> tuple[jax.Array, dict]:
        """(outputs of one sample (K,), what stood beside the weights at output taps)."""
        walk = Walk(taps["z"], taps["outputs"], taps["copies"])
        followed = {name for name, _ in (*self.plan.lone, *self.plan.joined)}
        followed |= {name for name, piece in self.plan.copies if piece}
        given = []
        for name in sorted(parameters):
            value, copy = parameters[name], taps["copies"].get((name, ()))
            if copy is not None:
                given.append(Value(value + copy, None, True))
            else:
                given.append(Value(value, _whole(name, value) if name in followed else None))
        (out,), kept = walk.run(self.program, [*given, *(Value(row, None, True) for row in rows)])
        return out.array, kept

    def _taps(self, samples: int) -> dict[str, Any]:
        """Zeros for each tap and sample, whose cotangents are what the taps find."""
        dtype = jnp.result_type(jnp.float32, *(p.dtype for p in self.net.parameters.values()))
        sites = [site for found in self.plan.joined.values() for site in found]
        return {
            "z": {group: jnp.zeros(samples, dtype) for group in self.plan.lone},
            "outputs": {s.path: jnp.zeros((samples, *s.scans, *s.y.shape), s.y.dtype) for s in sites},
            "copies": {group: jnp.zeros((samples, *p.shape), p.dtype) for group, p in self.plan.copies.items()},
        }

    def _norms(self, taps: dict, kept: Mapping[Path, Any], samples: int) -> SquareNorms:
        """{name: (N,) squared norms} of the tapped parameters: pieces of one parameter add up."""
        found: dict[str, list] = {name: [] for name in self.net.parameters if name not in self.plan.general}
        for (name, _), value in taps["z"].items():
            found[name].append(value)
        for (name, _), gradients in taps["copies"].items():
            found[name].append(norms.dense(jnp, gradients))
        for (name, _), sites in self.plan.joined.items():
            found[name].append(_joined_square_norms(sites, kept, taps["outputs"]))
        return {name: sum(values, start=jnp.zeros(samples)) for name, values in found.items()}

    def _on_their_own(self, rows: list, v: jax.Array) -> SquareNorms:
        """{name: (N,) squared norms} of the parameters without taps, by pulling single samples back."""
        if not self.plan.general:
            return {}
        own = {name: self.net.parameters[name] for name in self.plan.general}

        def function(some: Vector, inputs: Any) -> Any:
            return self.net.function({**self.net.parameters, **some}, inputs)

        return fallback.sample_square_norms(function, self.net.split, own)(rows, v)


def tap(net: Network, samples: int, general: Mapping[str, str]) -> Tapped:
    """The network, for so many samples at a time, with the parameters of `general` ({name: why}) on their own."""

    def shaped(array: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype)

    shapes = {name: shaped(net.parameters[name]) for name in sorted(net.parameters)}
    rows = [jax.ShapeDtypeStruct(row.shape[1:], row.dtype) for row in net.split.rows]
    program = for_many(jax.make_jaxpr(fallback.single(net.function, net.split))(shapes, rows))
    found_uses = FoundUses()

    def walk(shapes: Mapping, rows: list) -> list:
        given = [Value(shapes[name], _whole(name, shapes[name])) for name in sorted(shapes)]
        outs, _ = Walk(found_uses=found_uses).run(program, [*given, *(Value(row, None, True) for row in rows)])
        return [out.array for out in outs]

    jax.eval_shape(walk, shapes, rows)
    return Tapped(net, program, _plan(found_uses, shapes, samples, general))


def _joined_square_norms(
    sites: tuple[Site, ...], kept: Mapping[Path, Any], cotangents: Mapping[Path, Any]
) -> jax.Array:
    """(N,) squared norms of the sum over several places or steps, which add before they are squared."""
    first = sites[0]
    if len(sites) == 1 and not first.scans:
        return chunked(first.use, kept[first.path], cotangents[first.path])
    found = uses.square_norms(jnp, [_factors(site, kept[site.path], cotangents[site.path]) for site in sites])
    return jnp.sum(found.reshape(cotangents[first.path].shape[0], -1), axis=1)


def _factors(site: Site, beside: jax.Array, d: jax.Array) -> Factors:
    """Factors (samples x steps over the parameter, steps that add x positions, ...) of a use inside of scans."""
    samples, levels = d.shape[0], len(site.scans)
    over = [depth + 1 for depth in range(levels) if depth in site.view.scanned]
    again = [depth + 1 for depth in range(levels) if depth not in site.view.scanned]
    count, repeats = (math.prod(_lengths(site, scanned)) for scanned in (True, False))

    def flat(array: jax.Array) -> jax.Array:
        moved = jnp.transpose(array, (0, *over, *again, *range(levels + 1, array.ndim)))
        return moved.reshape(samples * count * repeats, *array.shape[levels + 1 :])

    made = site.use.factors(flat(beside), flat(d))
    joined = tuple(part.reshape(samples * count, repeats * part.shape[1], *part.shape[2:]) for part in made)
    factors = Factors(site.use.kind, joined)
    return factors.transposed() if site.use.flipped else factors


def _lengths(site: Site, scanned: bool) -> tuple[int, ...]:
    """Lengths of the scans that run over the parameter, or of those that do not."""
    return tuple(length for depth, length in enumerate(site.scans) if (depth in site.view.scanned) == scanned)


def _whole(name: str, array: Any) -> View:
    return View(name, axes=tuple(range(len(array.shape))))


def _plan(found_uses: FoundUses, shapes: Shapes, samples: int, excluded: Mapping[str, str]) -> Plan:
    """How each parameter is tapped, from what a walk has found; those that are `excluded` are on their own."""
    sites: dict[Group, list[Site]] = {}
    for site in found_uses.sites.values():
        sites.setdefault(site.view.group, []).append(site)
    lone: list[Group] = []
    joined: dict[Group, tuple[Site, ...]] = {}
    copies: dict[Group, jax.ShapeDtypeStruct] = {}
    general = dict(excluded)
    for name in [name for name in shapes if name not in excluded]:
        groups = [group for group in {**sites, **found_uses.general} if group[0] == name]
        own = (
            _plan_of_pieces(groups, sites, found_uses, samples)
            if rules.disjoint([piece for _, piece in groups])
            else None
        )
        if own is not None:
            lone += own.lone
            joined |= own.joined
            copies |= own.copies
        elif _small(shapes[name], samples):
            copies[name, ()] = shapes[name]
        else:
            general[name] = next(
                (found_uses.general[g] for g in groups if g in found_uses.general), "used in several ways"
            )
    return Plan(tuple(lone), joined, copies, general)


def _plan_of_pieces(
    groups: list[Group], sites: dict[Group, list[Site]], found_uses: FoundUses, samples: int
) -> Plan | None:
    """The taps of one parameter's pieces, or None if one cannot be tapped."""
    lone: list[Group] = []
    joined: dict[Group, tuple[Site, ...]] = {}
    copies: dict[Group, jax.ShapeDtypeStruct] = {}
    for group in groups:
        found = sites.get(group, [])
        if group not in found_uses.general and _fits_norm_tap(found):
            lone.append(group)
        elif group not in found_uses.general and _addable(found):
            joined[group] = tuple(found)
        elif group in found_uses.pieces and _small(found_uses.pieces[group], samples):
            copies[group] = found_uses.pieces[group]
        else:
            return None
    return Plan(tuple(lone), joined, copies)


def _small(shape: jax.ShapeDtypeStruct, samples: int) -> bool:
    return shape.size <= max(ROW, COPIED // samples)


def _fits_norm_tap(sites: list[Site]) -> bool:
    """Whether one norm tap finds the whole gradient: nothing else adds to it, in other places or at other steps."""
    return len(sites) == 1 and sites[0].batched and len(sites[0].view.scanned) == len(sites[0].scans)


def _addable(sites: list[Site]) -> bool:
    """Whether the uses are of the same numbers, in kinds that can be added."""
    first = sites[0]
    return all(
        site.use.frame is not None
        and site.use.frame == first.use.frame
        and _lengths(site, True) == _lengths(first, True)
        and not site.lone
        for site in sites
    )
