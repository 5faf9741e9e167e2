"""The network as a function of single samples with taps: one forward pass, whose pull-back gives J^T v and the squared
norms of the samples' own gradients together.

For each parameter, where the program uses it decides:

    norm tap       one recognised use: its squared norm is added up in the backward pass, and nothing is kept
    output taps    several uses that add (a tied head, a weight of a recurrent network): cotangents of the outputs
    copy           any other use of a small parameter: zeros for each sample are added to it
    on its own     any other use of a large one: single samples are pulled back, a few at a time
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from lnp.per_sample import norms
from lnp_jax import fallback
from lnp_jax.taps import joined, rules
from lnp_jax.taps.interpreter import Group, Path, Seen, Site, Value, Walk
from lnp_jax.taps.primitives import inner
from lnp_jax.taps.rules import View

COPIED = 2**21
"""Numbers, over all samples, up to which a parameter is copied for each sample."""
ROW = 2**12
"""Numbers of a parameter that is copied in any case: a bias, a scale."""
NAMED = 4
"""Parameters that a note names."""

Norms = dict[str, jax.Array]


@dataclass(frozen=True)
class Pulled:
    """What one backward pass has found.

    Attributes
    ----------
    gradient:
        J^T v.
    norms:
        {name: (N,) array of ||J_n^T v_n||^2}; None where samples are not taken apart.
    along:
        <J_m^T v_m, J^T v> of some samples, shape (M,), or None.
    """

    gradient: Mapping[str, jax.Array]
    norms: Norms | None = None
    along: jax.Array | None = None


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
    branched:
        Whether a norm tap is inside of a branch.
    """

    lone: tuple[Group, ...] = ()
    joined: Mapping[Group, tuple[Site, ...]] = field(default_factory=dict)
    copies: Mapping[Group, Any] = field(default_factory=dict)
    general: Mapping[str, str] = field(default_factory=dict)
    branched: bool = False

    @property
    def inner(self) -> bool:
        """Whether taps tell the inner products of the samples' gradients with their sum."""
        return not (self.general or self.branched)


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

    function: fallback.Function
    split: fallback.Split
    parameters: Mapping[str, jax.Array]
    program: Any
    plan: Plan

    def forward(self, rows: list, index: jax.Array | None = None) -> tuple[jax.Array, Callable[[jax.Array], Pulled]]:
        """(outputs (N, K), what pulls cotangents back), with inner products for the samples of the index."""
        samples = rows[0].shape[0]
        index = index if self.plan.inner else None
        over = {"z": 0, "outputs": 0, "copies": 0, "along": None}
        of_all = jax.jit(jax.vmap(self._one, (None, over, None, 0)))  # for eager callers: one program
        read = jax.jit(lambda taps, kept: self._norms(taps, kept, samples))
        with_taps = lambda p, taps: of_all(p, taps, index, rows)
        outputs, pullback, kept = jax.vjp(with_taps, dict(self.parameters), self._taps(samples, index), has_aux=True)

        def pull(v: jax.Array) -> Pulled:
            gradient, taps = pullback(v.astype(outputs.dtype))
            found = read(taps, kept) | self._on_their_own(rows, v)
            along = None if index is None else self._inner(taps, kept, index)
            return Pulled(gradient, {name: found[name] for name in self.parameters}, along)

        return outputs, pull

    def _one(self, parameters: Mapping, taps: dict, index: Any, rows: list) -> tuple[jax.Array, dict]:
        """(outputs of one sample (K,), what stood beside the weights at output taps)."""
        along = None if index is None else (taps["along"], index)
        walk = Walk(taps["z"], taps["outputs"], taps["copies"], along)
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

    def _taps(self, samples: int, index: jax.Array | None) -> dict[str, Any]:
        """Zeros, for each sample, and for each of the index."""
        dtype = jnp.result_type(jnp.float32, *(p.dtype for p in self.parameters.values()))
        sites = [site for found in self.plan.joined.values() for site in found]
        return {
            "z": {group: jnp.zeros(samples, dtype) for group in self.plan.lone},
            "outputs": {s.path: jnp.zeros((samples, *s.scans, *s.y.shape), s.y.dtype) for s in sites},
            "copies": {group: jnp.zeros((samples, *p.shape), p.dtype) for group, p in self.plan.copies.items()},
            "along": jnp.zeros(0 if index is None else len(index), dtype),
        }

    def _norms(self, taps: dict, kept: Mapping[Path, Any], samples: int) -> Norms:
        found: dict[str, list] = {name: [] for name in self.parameters if name not in self.plan.general}
        for (name, _), value in taps["z"].items():
            found[name].append(value)
        for (name, _), gradients in taps["copies"].items():
            found[name].append(norms.dense(jnp, gradients))
        for (name, _), uses in self.plan.joined.items():
            found[name].append(joined.square_norms(uses, kept, taps["outputs"]))
        return {name: sum(values, start=jnp.zeros(samples)) for name, values in found.items()}

    def _inner(self, taps: dict, kept: Mapping[Path, Any], index: jax.Array) -> jax.Array:
        """<J_m^T v_m, J^T v> of the samples of the index."""
        total = taps["along"]
        for gradients in taps["copies"].values():
            total = total + inner(gradients[index], jnp.sum(gradients, axis=0)[None])
        for uses in self.plan.joined.values():
            total = total + joined.inner_products(uses, kept, taps["outputs"], index)
        return total

    def _on_their_own(self, rows: list, v: jax.Array) -> Norms:
        if not self.plan.general:
            return {}
        own = {name: self.parameters[name] for name in self.plan.general}
        function = lambda some, inputs: self.function({**self.parameters, **some}, inputs)
        return fallback.sample_square_norms(function, self.split, own)(rows, v)


def tapped(
    function: fallback.Function,
    split: fallback.Split,
    parameters: Mapping,
    samples: int,
    excluded: frozenset[str] = frozenset(),
) -> Tapped:
    """The network of `function` on so many samples at a time, with those parameters on their own that are `excluded`
    from taps.
    """
    of_one = fallback.single(function, split)
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
    together: dict[Group, tuple[Site, ...]] = {}
    copies: dict[Group, Any] = {}
    general = dict.fromkeys(excluded, "its taps differ from single samples")
    for name, shape in shapes.items():
        groups = [group for group in {**uses, **seen.general} if group[0] == name]
        own = _groups(groups, uses, seen, samples) if rules.disjoint([piece for _, piece in groups]) else None
        if name in excluded:
            continue
        if own is not None:
            lone += own.lone
            together |= own.joined
            copies |= own.copies
        elif _small(shape, samples):
            copies[name, ()] = shape
        else:
            general[name] = next((seen.general[g] for g in groups if g in seen.general), "used in several ways")
    return Plan(tuple(lone), together, copies, general, any(site.lone for group in lone for site in uses[group]))


def _groups(groups: list[Group], uses: dict[Group, list[Site]], seen: Seen, samples: int) -> Plan | None:
    """The taps of one parameter's pieces, or None if one cannot be tapped."""
    lone: list[Group] = []
    together: dict[Group, tuple[Site, ...]] = {}
    copies: dict[Group, Any] = {}
    for group in groups:
        found = uses.get(group, [])
        if group not in seen.general and _alone(found):
            lone.append(group)
        elif group not in seen.general and _add(found):
            together[group] = tuple(found)
        elif group in seen.pieces and _small(seen.pieces[group], samples):
            copies[group] = seen.pieces[group]
        else:
            return None
    return Plan(tuple(lone), together, copies)


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
        and joined.lengths(site, True) == joined.lengths(first, True)
        and not site.lone
        for site in uses
    )
