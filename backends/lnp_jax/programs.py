"""What a traced program holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

INLINED = frozenset({"jit", "pjit", "closed_call", "core_call", "core_closed_call"})
CHECKPOINTS = frozenset({"checkpoint", "remat", "remat2"})
ALONE = frozenset({"shard_map", "xla_pmap", "axis_index"})
"""Operations that bind axes of their own, or ask for a place along one."""


def operations_of(jaxpr: Any) -> Iterator[Any]:
    """All operations of a program, those of the programs inside of it too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inside in programs_in(eqn.params):
            yield from operations_of(inside)


def programs_in(params: Mapping[str, Any]) -> Iterator[Any]:
    """The programs among an operation's parameters; JAX's own function for this is younger than what lnp runs on."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner


def talking(jaxpr: Any) -> str:
    """The name of an operation between devices along an axis that is bound outside of the program, or ""."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ALONE:
            continue
        over = (eqn.params.get("axes"), eqn.params.get("axis_name"))
        if any(isinstance(name, str) for axes in over for name in (axes if isinstance(axes, tuple) else (axes,))):
            return eqn.primitive.name
        for inside in programs_in(eqn.params):
            if found := talking(inside):
                return found
    return ""


def bound(eqn: Any, arrays: Sequence[Any], jaxpr: Any) -> list[Any]:
    """What one operation of a program makes of these arrays."""
    if not any(True for _ in programs_in(eqn.params)):
        outs = eqn.primitive.bind(*arrays, **eqn.params)
        return list(outs) if eqn.primitive.multiple_results else [outs]
    # with programs inside, in a program of its own: how those are passed on differs between operations
    given = {atom: a for atom, a in zip(eqn.invars, arrays, strict=True) if not isinstance(atom, core.Literal)}
    names: Any = jaxpr.debug_info  # some releases demand as many names as there are values
    if names is not None:
        names = names._replace(arg_names=("",) * len(given), result_paths=("",) * len(eqn.outvars))
    alone = core.Jaxpr((), list(given), eqn.outvars, [eqn], eqn.effects, names)
    return list(core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*given.values()))


def called_by(eqn: Any) -> Any:
    """The closed program that a call runs."""
    return closed(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"])


def closed(program: Any) -> Any:
    """A program with its constants."""
    return program if hasattr(program, "consts") else core.ClosedJaxpr(program, ())


def for_many(program: Any) -> Any:
    """The closed program of one sample, to be mapped over many that several devices share.

    A network may say how its activations lie on a mesh (`jax.lax.with_sharding_constraint`). An axis of length one
    that is given a mesh's axis would keep it from the axis of the samples, and every device would hold all of them.
    """
    return core.ClosedJaxpr(_for_many(program.jaxpr), program.consts)


def _for_many(jaxpr: Any) -> Any:
    """The same of a program without its constants, and of those inside of it."""
    eqns = []
    for eqn in jaxpr.eqns:
        params = {name: _inside(value) for name, value in eqn.params.items()}
        if eqn.primitive.name == "sharding_constraint" and isinstance(params["sharding"], NamedSharding):
            params["sharding"] = _without_lone_axes(params["sharding"], eqn.invars[0].aval.shape)
        eqns.append(eqn.replace(params=params))
    return jaxpr.replace(eqns=eqns)


def _inside(value: Any) -> Any:
    """An operation's parameter, with the programs in it for many samples."""
    if isinstance(value, tuple | list):
        return type(value)(map(_inside, value)) if any(True for _ in programs_in({"": value})) else value
    if isinstance(value, core.ClosedJaxpr):
        return for_many(value)
    return _for_many(value) if isinstance(value, core.Jaxpr) else value


def _without_lone_axes(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    spec = [None if size == 1 else axes for axes, size in zip(sharding.spec, shape, strict=False)]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
