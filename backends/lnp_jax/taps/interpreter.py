"""A walk through a traced program that puts taps where parameters are used, into loops and branches too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax import lax
from jax.extend import core

from lnp_jax.programs import CHECKPOINTS, INLINED, bound, called_by, closed
from lnp_jax.taps.pooling import max_pool
from lnp_jax.taps.primitives import tapped_use
from lnp_jax.taps.rules import Use, View, pieces_of, use_of, view_after

Path = tuple[int, ...]
"""Where in the program an operation is: its number, in each of the programs around it."""
Group = tuple[str, tuple]
"""(name of a parameter, the piece of it)."""


@dataclass(frozen=True)
class Value:
    """An array of one sample, or of all.

    Attributes
    ----------
    array:
        The numbers.
    view:
        If they are a parameter's, whose uses are followed.
    batched:
        Whether they depend on the sample.
    """

    array: Any
    view: View | None = None
    batched: bool = False


@dataclass(frozen=True)
class Site:
    """A recognised use.

    Attributes
    ----------
    path:
        Where it is.
    view, use:
        Of what, and how.
    scans:
        Lengths of the scans around it.
    lone:
        Whether it may only be tapped on its own: inside a branch.
    batched:
        Whether what comes out differs between samples.
    y:
        Shape and type of what comes out.
    """

    path: Path
    view: View
    use: Use
    scans: tuple[int, ...]
    lone: bool
    batched: bool
    y: Any


@dataclass
class FoundUses:
    """What a walk has found.

    Attributes
    ----------
    sites:
        The recognised uses.
    general:
        {group whose use was not recognised: the operation}.
    pieces:
        {group that was cut out: its shape and type}.
    """

    sites: dict[Path, Site] = field(default_factory=dict)
    general: dict[Group, str] = field(default_factory=dict)
    pieces: dict[Group, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Walk:
    """One pass through the program of one sample.

    Attributes
    ----------
    z:
        {group that is tapped on its own: a zero of shape ()}.
    outputs:
        {path of a site whose output is tapped: zeros of its shape}; inside a scan, of this step.
    copies:
        {piece that is tapped itself: zeros of its shape}.
    found_uses:
        Is filled on the way, or None.
    path, scans, lone:
        Where the walk is.
    """

    z: Mapping[Group, Any] = field(default_factory=dict)
    outputs: Mapping[Path, Any] = field(default_factory=dict)
    copies: Mapping[Group, Any] = field(default_factory=dict)
    found_uses: FoundUses | None = None
    path: Path = ()
    scans: tuple[int, ...] = ()
    lone: bool = False

    def run(self, program: Any, values: Sequence[Value]) -> tuple[list[Value], dict[Path, Any]]:
        """(outputs, {path of a tapped output: what stood beside the weight}) of a closed program."""
        jaxpr = program.jaxpr
        known = dict(zip(jaxpr.constvars, map(Value, program.consts), strict=True))
        known.update(zip(jaxpr.invars, values, strict=True))
        kept: dict[Path, Any] = {}

        def read(atom: Any) -> Value:
            return Value(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for number, eqn in enumerate(jaxpr.eqns):
            there = replace(self, path=(*self.path, number))
            outs, more = there._step(eqn, [read(atom) for atom in eqn.invars], jaxpr)
            kept |= more
            known.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars], kept

    def _step(self, eqn: Any, values: list[Value], jaxpr: Any) -> tuple[list[Value], dict[Path, Any]]:
        """(outputs, what stood beside tapped weights) of one operation, by what it does with views of parameters."""
        name, at = eqn.primitive.name, [position for position, value in enumerate(values) if value.view]
        if not at:
            return _bound(eqn, values, jaxpr), {}
        if name in INLINED:
            return self.run(called_by(eqn), values)
        if name == "scan" and (parts := _parts_of_scan(eqn.params)) is not None:
            return self._scan(eqn, values, *parts)
        if name in CHECKPOINTS:
            return self._checkpoint(eqn, values)
        if name == "cond" and 0 not in at:
            return self._branch(eqn, values), {}
        view = values[0].view
        if view is not None and at == [0]:
            after = view_after(view, eqn)
            if after is not None:
                return [replace(out, view=after) for out in _bound(eqn, values, jaxpr)], {}
            pieces = None if self.scans else pieces_of(view, eqn)
            if pieces is not None:
                return [self._piece(*pair) for pair in zip(_bound(eqn, values, jaxpr), pieces, strict=True)], {}
        return self._used(eqn, values, jaxpr, at)

    def _used(self, eqn: Any, values: list[Value], jaxpr: Any, at: list[int]) -> tuple[list[Value], dict[Path, Any]]:
        """A use of a view: with a tap, where it is recognised."""
        position, view = at[0], values[at[0]].view
        use = use_of(eqn, position, view) if len(at) == 1 and view is not None else None
        outs = _bound(eqn, values, jaxpr)
        if use is None or view is None:
            self._general([values[position] for position in at], eqn.primitive.name)
            return outs, {}
        (out,) = outs
        if self.found_uses is not None:
            y = jax.ShapeDtypeStruct(out.array.shape, out.array.dtype)
            self.found_uses.sites[self.path] = Site(self.path, view, use, self.scans, self.lone, out.batched, y)
        if self.path in self.outputs:
            beside = lax.stop_gradient(values[use.operand].array)
            return [Value(out.array + self.outputs[self.path], None, True)], {self.path: beside}
        if view.group in self.z:
            beside, weight = values[use.operand].array, values[position].array
            made = tapped_use(use, _operation(eqn, position), beside, weight, self.z[view.group])
            return [Value(made, None, True)], {}
        return outs, {}

    def _piece(self, out: Value, view: View) -> Value:
        """What was cut out of a parameter: tapped itself, or followed."""
        if self.found_uses is not None:
            self.found_uses.pieces[view.group] = jax.ShapeDtypeStruct(out.array.shape, out.array.dtype)
        if view.group in self.copies:
            return Value(out.array + self.copies[view.group], None, True)
        return replace(out, view=view)

    def _general(self, values: Sequence[Value], why: str) -> None:
        for value in values:
            if self.found_uses is not None and value.view is not None:
                self.found_uses.general.setdefault(value.view.group, why)

    def _scan(self, eqn: Any, values: list[Value], head: int, carries: int) -> tuple[list[Value], dict[Path, Any]]:
        """Over its leading axis a parameter is used in pieces; otherwise again at each step."""
        params, depth, length = eqn.params, len(self.scans), eqn.params["length"]
        consts, init, xs = values[:head], values[head : head + carries], values[head + carries :]
        self._general(init, "carry of a scan")
        batched = any(value.batched for value in values)
        views = [value.view and value.view.step(depth) for value in xs]
        taps = {path: tap for path, tap in self.outputs.items() if path[: len(self.path)] == self.path}

        def body(carry: list, now: tuple) -> tuple[list, tuple]:
            arrays, taps = now
            inner = replace(self, outputs=taps, scans=(*self.scans, length))
            steps = [Value(array, view, batched) for array, view in zip(arrays, views, strict=True)]
            outs, kept = inner.run(
                closed(params["jaxpr"]), [*consts, *(Value(array, None, batched) for array in carry), *steps]
            )
            self._general(outs, "result of a scan")
            arrays = [out.array for out in outs]
            return arrays[:carries], (arrays[carries:], kept)

        rows = [value.array for value in xs]
        how = {"length": length, "reverse": params["reverse"], "unroll": params["unroll"]}
        carry, (ys, kept) = lax.scan(body, [value.array for value in init], (rows, taps), **how)
        return [Value(array, None, batched) for array in (*carry, *ys)], kept

    def _checkpoint(self, eqn: Any, values: list[Value]) -> tuple[list[Value], dict[Path, Any]]:
        """A part that is recomputed in the backward pass, with its taps in it."""

        def recomputed(arrays: list) -> tuple[list, dict[Path, Any]]:
            given = [replace(value, array=array) for value, array in zip(values, arrays, strict=True)]
            outs, kept = self.run(called_by(eqn), given)
            self._general(outs, "result of a checkpoint")
            return [out.array for out in outs], kept

        how = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
        outs, kept = jax.checkpoint(recomputed, **how)([value.array for value in values])
        return _values(outs, values), kept

    def _branch(self, eqn: Any, values: list[Value]) -> list[Value]:
        """A choice among programs: norm taps work inside, outputs cannot be tapped there."""

        def branch(number: int, program: Any) -> Callable:
            def taken(*arrays: Any) -> list:
                inner = replace(self, path=(*self.path, number), lone=True)
                given = [replace(value, array=array) for value, array in zip(values[1:], arrays, strict=True)]
                outs, _ = inner.run(program, given)
                self._general(outs, "result of a branch")
                return [out.array for out in outs]

            return taken

        branches = [branch(number, program) for number, program in enumerate(eqn.params["branches"])]
        outs = lax.switch(values[0].array, branches, *[value.array for value in values[1:]])
        return _values(outs, values)


def _bound(eqn: Any, values: list[Value], jaxpr: Any) -> list[Value]:
    """The operation as it is."""
    arrays = [value.array for value in values]
    pool = max_pool(eqn, *arrays) if eqn.primitive.name == "reduce_window_max" else None
    if pool is not None:
        return _values([pool], values)
    return _values(bound(eqn, arrays, jaxpr), values)


def _operation(eqn: Any, position: int) -> Callable:
    """(the other operand, the one at `position`) -> what comes out of an operation with two."""

    def operation(x: Any, w: Any) -> Any:
        return eqn.primitive.bind(*((w, x) if position == 0 else (x, w)), **eqn.params)

    return operation


def _values(arrays: Sequence, given: Sequence[Value]) -> list[Value]:
    batched = any(value.batched for value in given)
    return [Value(array, None, batched) for array in arrays]


def _parts_of_scan(params: Any) -> tuple[int, int] | None:
    """(constants, carries) that stand before what a scan goes over; None where a release tells it in another way."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    try:
        consts, carries, _ = map(len, params["ft_in"].elts)  # from JAX 0.11 on
    except (KeyError, AttributeError, TypeError, ValueError):
        return None
    return consts, carries
