"""Batch normalisation in training mode, frozen at this batch's statistics.

No library is asked what a layer is. A statistic of the batch is seen in the traced program: it is computed from the
samples, has no axis that grows with the batch, and the network averages it into a state that is not trained. From there
on it is followed as long as it meets constants and states only; where it meets parameters or samples, its value is
held. A reduction over samples that no state keeps, such as a graph's readout, belongs to the function that is measured.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from lnp_jax.fallback import Function, Split
from lnp_jax.programs import CHECKPOINTS, INLINED, bound, called_by

NOTE = "batch normalisation in training mode keeps this batch's statistics"

Path = tuple[int, ...]
"""Where in a program an operation is: its number, in each of the programs around it."""
Place = tuple[Path, int]
"""(the operation that makes an array, which of its results)."""


@dataclass(frozen=True)
class Traced:
    """The program of a function (parameters, states, inputs) -> outputs, for inputs of some shapes.

    Attributes
    ----------
    program:
        Closed, of the leaves of its arguments.
    tree:
        Structure, shapes and types of the outputs.
    shapes:
        Of the inputs.
    """

    program: Any
    tree: Any
    shapes: Any


def traced(call: Callable, parameters: Any, states: Any, inputs: Any) -> Traced:
    """The program of `call({**states, **parameters}, inputs)`."""
    program, tree = jax.make_jaxpr(
        lambda parameters, states, inputs: call({**states, **parameters}, inputs), return_shape=True
    )(parameters, states, inputs)
    return Traced(program, tree, _shapes(inputs))


def held_function(call: Callable, batch: Traced, parameters: Any, states: Any, split: Split) -> Function | None:
    """(parameters, inputs) -> outputs with the statistics that the batch has at these parameters, or None if it has
    none. The inputs may hold any number of samples.
    """
    inputs = split.inputs(split.rows)
    places = _statistics(call, batch, parameters, states, split)
    if not places:
        return None

    @jax.jit  # for eager callers: one program
    def values_of(parameters: Any, states: Any, inputs: Any) -> list:
        replay = _Replay(wanted=places)
        _walk(batch.program, jax.tree.leaves((parameters, states, inputs)), replay)
        return [replay.found[place] for place in places]

    values = dict(zip(places, values_of(parameters, states, inputs), strict=True))
    signature = _signature(batch.program)

    def function(parameters: Any, inputs: Any) -> Any:
        here = batch if _shapes(inputs) == batch.shapes else traced(call, parameters, states, inputs)
        if _signature(here.program) != signature:
            raise ValueError("it computes its batch statistics in another way for another number of samples")
        leaves = jax.tree.leaves((parameters, states, inputs))
        return jax.tree.unflatten(jax.tree.structure(here.tree), _walk(here.program, leaves, _Replay(held=values)))

    return function


def _statistics(call: Callable, batch: Traced, parameters: Any, states: Any, split: Split) -> list[Place]:
    """Where in the program the values are that are held: it is compared with that of twice the batch, in which
    what grows with the batch has other shapes.
    """
    rows = [jax.ShapeDtypeStruct(row.shape, row.dtype) for row in split.rows]
    given = [
        *(_Fact(trained=True, size=leaf.size) for leaf in jax.tree.leaves(parameters)),
        *map(_state, jax.tree.leaves(states)),
        *(_DATA if isinstance(leaf, jax.ShapeDtypeStruct) else _Fact() for leaf in jax.tree.leaves(split.inputs(rows))),
    ]
    first = _Facts({})
    _walk(batch.program, given, first)
    if not first.averages:
        return []  # whatever grows with the batch
    twice = [jax.ShapeDtypeStruct((2 * row.shape[0], *row.shape[1:]), row.dtype) for row in rows]
    with contextlib.suppress(Exception):  # that the user's code runs with another batch is not promised
        larger = traced(call, parameters, states, split.inputs(twice))
        if _signature(larger.program) == _signature(batch.program):
            facts = _Facts(_growing(batch.program, larger.program))
            _walk(batch.program, given, facts)
            return facts.held()
    return []


@dataclass(frozen=True)
class _Fact:
    """What is known of an array.

    Attributes
    ----------
    data, over:
        Whether it depends on samples, and whether it grows with their number.
    trained, state:
        Whether it depends on parameters, other than through statistics; on what is closed over or not trained.
    roots:
        The reductions over samples that it is made of, where it does not grow.
    place, size:
        Where it comes from, and how many numbers it has.
    scaled:
        Whether it is a multiple, by one number, of something.
    """

    data: bool = False
    over: bool = False
    trained: bool = False
    state: bool = False
    roots: frozenset[Place] = frozenset()
    place: Place | None = None
    size: int = 0
    scaled: bool = False


_DATA = _Fact(data=True, over=True)


def _state(array: Any) -> _Fact:
    """Of an array that is not trained. A running average has an axis; the epsilon beside it is a number."""
    floating = jnp.issubdtype(jnp.result_type(array), jnp.inexact)
    return _Fact(state=floating and jnp.ndim(array) > 0, size=math.prod(jnp.shape(array)))


@dataclass
class _Facts:
    """Follows what arrays depend on.

    Attributes
    ----------
    growing:
        {place of what grows with the batch}.
    averages:
        What was joined to a state, as a running average is.
    operations:
        (what was given, what was made) of each.
    """

    growing: Mapping[Place, bool]
    averages: list[_Fact] = field(default_factory=list)
    operations: list[tuple[Sequence[_Fact], list[_Fact]]] = field(default_factory=list)

    def constant(self, value: Any) -> _Fact:
        """What a program has closed over is not trained."""
        return _state(value)

    def operation(self, path: Path, eqn: Any, given: Sequence[_Fact], jaxpr: Any) -> list[_Fact]:
        """What it makes depends on what it is given; a reduction over samples begins anew."""
        made = [self._made((path, number), eqn, given) for number in range(len(eqn.outvars))]
        if eqn.primitive.name == "add" and all(fact.scaled for fact in given):
            for new, old in (given, given[::-1]):
                if new.data and old.state and not old.trained and new.size == old.size:
                    self.averages.append(new)
        self.operations.append((given, made))
        return made

    def _made(self, place: Place, eqn: Any, given: Sequence[_Fact]) -> _Fact:
        """One result of an operation."""
        data, trained = any(fact.data for fact in given), any(fact.trained for fact in given)
        size = math.prod(getattr(eqn.outvars[place[1]].aval, "shape", ()))
        if self.growing.get(place, False):
            return _Fact(data, True, trained, place=place, size=size)
        beside = [fact for fact in given if not (fact.data and fact.over)]
        if self.growing and len(beside) < len(given):
            trained = any(fact.trained for fact in beside)
            return _Fact(data, False, trained, roots=frozenset([place]), place=place, size=size)
        state, roots = any(fact.state for fact in given), frozenset[Place]().union(*(fact.roots for fact in given))
        scaled = eqn.primitive.name == "mul" and any(fact.size == 1 for fact in given)
        scaled |= len(given) == 1 and given[0].scaled  # another type or shape
        return _Fact(data, False, trained, state, roots, place, size, scaled)

    def checkpoint(self, path: Path, eqn: Any, given: Sequence[_Fact]) -> list[_Fact]:
        """As any call."""
        return _walk(called_by(eqn), given, self, path)

    def held(self) -> list[Place]:
        """Where what is made of statistics alone meets anything else."""
        kept = frozenset().union(*(fact.roots for fact in self.averages if not fact.trained))

        def fixed(fact: _Fact) -> bool:
            return fact.data and not fact.over and not fact.trained and bool(fact.roots) and fact.roots <= kept

        found = {
            fact.place: None
            for given, made in self.operations
            if not all(map(fixed, made))
            for fact in given
            if fixed(fact) and fact.place is not None
        }
        return list(found)


@dataclass
class _Replay:
    """Computes a program, with some values in place of what it would make, and keeps others.

    Attributes
    ----------
    held:
        {place: value that is put there}.
    wanted, found:
        Places, and what was made there.
    """

    held: Mapping[Place, Any] = field(default_factory=dict)
    wanted: Sequence[Place] = ()
    found: dict[Place, Any] = field(default_factory=dict)

    def constant(self, value: Any) -> Any:
        """As it is."""
        return value

    def operation(self, path: Path, eqn: Any, given: Sequence[Any], jaxpr: Any) -> list[Any]:
        """As it is, but for what is held."""
        made = [self.held.get((path, n), out) for n, out in enumerate(bound(eqn, list(given), jaxpr))]
        self.found |= {(path, n): out for n, out in enumerate(made) if (path, n) in self.wanted}
        return made

    def checkpoint(self, path: Path, eqn: Any, given: Sequence[Any]) -> list[Any]:
        """Computed again in the backward pass, as the user wants it; not where there is none."""
        if self.wanted:
            return _walk(called_by(eqn), given, self, path)
        how = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
        return jax.checkpoint(lambda *arrays: _walk(called_by(eqn), arrays, self, path), **how)(*given)


def _walk(program: Any, values: Sequence[Any], visitor: Any, path: Path = ()) -> list[Any]:
    """What a closed program returns, by what a visitor makes of its operations; calls are entered."""
    jaxpr = program.jaxpr
    known = dict(zip(jaxpr.constvars, map(visitor.constant, program.consts), strict=True))
    known.update(zip(jaxpr.invars, values, strict=True))

    def read(atom: Any) -> Any:
        return visitor.constant(atom.val) if isinstance(atom, core.Literal) else known[atom]

    for number, eqn in enumerate(jaxpr.eqns):
        given, there = [read(atom) for atom in eqn.invars], (*path, number)
        if eqn.primitive.name in INLINED:
            outs = _walk(called_by(eqn), given, visitor, there)
        elif eqn.primitive.name in CHECKPOINTS:
            outs = visitor.checkpoint(there, eqn, given)
        else:
            outs = visitor.operation(there, eqn, given, jaxpr)
        known.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _operations(program: Any, path: Path = ()) -> list[tuple[Path, Any]]:
    """The operations of a program and of those that it calls, as they are walked."""
    found = []
    for number, eqn in enumerate(program.jaxpr.eqns):
        there = (*path, number)
        entered = eqn.primitive.name in INLINED | CHECKPOINTS
        found += _operations(called_by(eqn), there) if entered else [(there, eqn)]
    return found


def _signature(program: Any) -> list[tuple[Path, str]]:
    """What has to be the same for places to mean the same."""
    return [(path, eqn.primitive.name) for path, eqn in _operations(program)]


def _growing(program: Any, larger: Any) -> dict[Place, bool]:
    """Whether what is made at each place has another shape for a larger batch."""
    pairs = zip(_operations(program), _operations(larger), strict=True)
    return {
        (path, n): a.aval.shape != b.aval.shape
        for (path, eqn), (_, other) in pairs
        for n, (a, b) in enumerate(zip(eqn.outvars, other.outvars, strict=True))
        if hasattr(a.aval, "shape")
    }


def _shapes(tree: Any) -> tuple:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
