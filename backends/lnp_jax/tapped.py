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

from lnp import norms
from lnp_jax import parts, sites
from lnp_jax.interpret import Group, Path, Seen, Site, Value, Walk
from lnp_jax.sites import View
from lnp_jax.taps import chunked

COPIED = 2**21
"""Numbers, over all samples, up to which a parameter is copied for each sample."""
ROW = 2**12
"""Numbers of a parameter that is copied in any case: a bias, a scale."""
NAMED = 4
"""Parameters that a note names."""

Norms = dict[str, jax.Array]


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
    copies: Mapping[Group, Any] = field(default_factory=dict)
    general: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tapped:
    """A network whose samples do not interact.

    Attributes
    ----------
    function, split, parameters:
        (parameters, inputs) -> outputs; the inputs' rows; {name: array}.
    program:
        Of one sample.
    plan:
        How it is tapped.
    """

    function: parts.Function
    split: parts.Split
    parameters: Mapping[str, jax.Array]
    program: Any
    plan: Plan

    def forward(self, rows: list) -> tuple[jax.Array, Callable[[jax.Array], tuple[Mapping, Norms]]]:
        """(outputs (N, K), v -> (J^T v, {name: (N,) array of ||J_n^T v_n||^2}))."""
        samples = rows[0].shape[0]
        of_all = jax.jit(jax.vmap(self._one, (None, 0, 0)))  # for eager callers: one program, not one per operation
        read = jax.jit(lambda taps, kept: self._norms(taps, kept, samples))
        outputs, pullback, kept = jax.vjp(
            lambda p, taps: of_all(p, taps, rows), dict(self.parameters), self._taps(samples), has_aux=True
        )

        def pull(v: jax.Array) -> tuple[Mapping, Norms]:
            gradient, taps = pullback(v.astype(outputs.dtype))
            found = read(taps, kept) | self._on_their_own(rows, v)
            return gradient, {name: found[name] for name in self.parameters}

        return outputs, pull

    def plain(self, parameters: Mapping, rows: list) -> jax.Array:
        """Outputs (N, K), without taps."""
        return jax.vmap(parts.single(self.function, self.split), (None, 0))(parameters, rows)

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

    def _taps(self, samples: int) -> dict[str, dict]:
        """Zeros, for each sample."""
        dtype = jnp.result_type(jnp.float32, *(p.dtype for p in self.parameters.values()))
        sites = [site for found in self.plan.joined.values() for site in found]
        return {
            "z": {group: jnp.zeros(samples, dtype) for group in self.plan.lone},
            "outputs": {s.path: jnp.zeros((samples, *s.scans, *s.y.shape), s.y.dtype) for s in sites},
            "copies": {group: jnp.zeros((samples, *p.shape), p.dtype) for group, p in self.plan.copies.items()},
        }

    def _norms(self, taps: dict, kept: Mapping[Path, Any], samples: int) -> Norms:
        found: dict[str, list] = {name: [] for name in self.parameters if name not in self.plan.general}
        for (name, _), value in taps["z"].items():
            found[name].append(value)
        for (name, _), gradients in taps["copies"].items():
            found[name].append(norms.explicit(jnp, gradients))
        for (name, _), uses in self.plan.joined.items():
            found[name].append(_joined(uses, kept, taps["outputs"]))
        return {name: sum(values, start=jnp.zeros(samples)) for name, values in found.items()}

    def _on_their_own(self, rows: list, v: jax.Array) -> Norms:
        if not self.plan.general:
            return {}
        own = {name: self.parameters[name] for name in self.plan.general}
        function = lambda some, inputs: self.function({**self.parameters, **some}, inputs)
        return parts.sample_square_norms(function, self.split, own)(rows, v)


def tapped(
    function: parts.Function,
    split: parts.Split,
    parameters: Mapping,
    samples: int,
    excluded: frozenset[str] = frozenset(),
) -> Tapped:
    """The network of `function` on so many samples at a time, with those parameters on their own that are `excluded`
    from taps.
    """
    of_one = parts.single(function, split)
    shaped = lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype)
    shapes = {name: shaped(parameters[name]) for name in sorted(parameters)}
    rows = [jax.ShapeDtypeStruct(row.shape[1:], row.dtype) for row in split.rows]
    program = jax.make_jaxpr(of_one)(shapes, rows)
    seen = Seen()

    def look(shapes: Mapping, rows: list) -> list:
        given = [Value(shapes[name], _whole(name, shapes[name])) for name in sorted(shapes)]
        outs, _ = Walk(seen=seen).run(program, [*given, *(Value(row, None, True) for row in rows)])
        return [out.array for out in outs]

    jax.eval_shape(look, shapes, rows)
    return Tapped(function, split, parameters, program, _decided(seen, shapes, samples, excluded))


def general_note(plan: Plan) -> tuple[str, ...]:
    """Which parameters are pulled back on their own, and why."""
    if not plan.general:
        return ()
    named = [f"{name} ({why})" for name, why in plan.general.items()]
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return (f"single samples run on their own, which is slower, for {', '.join(named[:NAMED])}{more}",)


def _whole(name: str, array: Any) -> View:
    return View(name, axes=tuple(range(len(array.shape))))


def _decided(seen: Seen, shapes: Mapping[str, Any], samples: int, excluded: frozenset[str]) -> Plan:
    uses: dict[Group, list[Site]] = {}
    for site in seen.sites.values():
        uses.setdefault(site.view.group, []).append(site)
    lone: list[Group] = []
    joined: dict[Group, tuple[Site, ...]] = {}
    copies: dict[Group, Any] = {}
    general = dict.fromkeys(excluded, "its taps differ from single samples")
    for name, shape in shapes.items():
        groups = [group for group in {**uses, **seen.general} if group[0] == name]
        own = _groups(groups, uses, seen, samples) if sites.disjoint([piece for _, piece in groups]) else None
        if name in excluded:
            continue
        if own is not None:
            lone += own.lone
            joined |= own.joined
            copies |= own.copies
        elif _small(shape, samples):
            copies[name, ()] = shape
        else:
            general[name] = next((seen.general[g] for g in groups if g in seen.general), "used in several ways")
    return Plan(tuple(lone), joined, copies, general)


def _groups(groups: list[Group], uses: dict[Group, list[Site]], seen: Seen, samples: int) -> Plan | None:
    """The taps of one parameter's pieces, or None if one cannot be tapped."""
    lone: list[Group] = []
    joined: dict[Group, tuple[Site, ...]] = {}
    copies: dict[Group, Any] = {}
    for group in groups:
        found = uses.get(group, [])
        if group not in seen.general and _alone(found):
            lone.append(group)
        elif group not in seen.general and _add(found):
            joined[group] = tuple(found)
        elif group in seen.pieces and _small(seen.pieces[group], samples):
            copies[group] = seen.pieces[group]
        else:
            return None
    return Plan(tuple(lone), joined, copies)


def _small(shape: Any, samples: int) -> bool:
    return shape.size <= max(ROW, COPIED // samples)


def _alone(uses: list[Site]) -> bool:
    """Whether one norm tap sees the whole gradient: nothing else adds to it, in other places or at other steps."""
    return len(uses) == 1 and uses[0].batched and len(uses[0].view.scanned) == len(uses[0].scans)


def _add(uses: list[Site]) -> bool:
    """Whether the uses are of the same numbers, in kinds that can be added."""
    first = uses[0]
    return all(
        site.use.frame is not None
        and site.use.frame == first.use.frame
        and _lengths(site, True) == _lengths(first, True)
        and not site.lone
        for site in uses
    )


def _lengths(site: Site, scanned: bool) -> tuple[int, ...]:
    """Of the scans that run over the parameter, or of those that do not."""
    return tuple(length for depth, length in enumerate(site.scans) if (depth in site.view.scanned) == scanned)


def _joined(uses: tuple[Site, ...], kept: Mapping[Path, Any], cotangents: Mapping[Path, Any]) -> jax.Array:
    """(N,) squared norms of sums over several places or steps."""
    if len(uses) == 1 and not uses[0].scans:
        return chunked(uses[0].use, kept[uses[0].path], cotangents[uses[0].path])
    outer, rows = [], []
    for site in uses:
        factors = _factors(site, kept[site.path], cotangents[site.path])
        if site.use.kind == "rows":
            rows.append(factors)
        else:
            outer.append(factors[::-1] if site.use.flipped else factors)
    samples = cotangents[uses[0].path].shape[0]
    total = jnp.zeros(())
    if outer:
        left, right = (jnp.concatenate(same, axis=1) for same in zip(*outer, strict=True))
        total = total + norms.outer(jnp, left, right)
    if rows:
        index, values = (jnp.concatenate(same, axis=1) for same in zip(*rows, strict=True))
        total = total + norms.rows(jnp, index, values)
    if outer and rows:
        total = total + 2 * norms.rows_and_outer(jnp, index, values, left, right)
    return jnp.sum(total.reshape(samples, -1), axis=1)


def _factors(site: Site, beside: jax.Array, d: jax.Array) -> tuple[jax.Array, ...]:
    """Factors (samples x steps over the parameter, steps that add x positions, ...)."""
    samples, levels = d.shape[0], len(site.scans)
    over = [depth + 1 for depth in range(levels) if depth in site.view.scanned]
    again = [depth + 1 for depth in range(levels) if depth not in site.view.scanned]
    count, repeats = (math.prod(_lengths(site, scanned)) for scanned in (True, False))

    def flat(array: jax.Array) -> jax.Array:
        moved = jnp.transpose(array, (0, *over, *again, *range(levels + 1, array.ndim)))
        return moved.reshape(samples * count * repeats, *array.shape[levels + 1 :])

    made = site.use.factors(flat(beside), flat(d))
    return tuple(part.reshape(samples * count, repeats * part.shape[1], *part.shape[2:]) for part in made)
