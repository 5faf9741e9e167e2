"""What a traced program holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

CALLS = frozenset(
    {
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "checkpoint",
    }
)
"""Operations that run one program on their inputs, once."""


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


def reached(jaxpr: Any, given: Sequence[bool]) -> list[bool]:
    """Which outputs of a program depend on those of its inputs that are `given`; rather too many than too few."""
    known = {var for var, flag in zip(jaxpr.invars, given, strict=True) if flag}
    for eqn in jaxpr.eqns:
        flags = [not hasattr(atom, "val") and atom in known for atom in eqn.invars]
        inside = [program for program in programs_in(eqn.params) if len(program.invars) == len(flags)]
        called = eqn.primitive.name in CALLS and len(inside) == 1
        outs = reached(inside[0], flags) if called else [any(flags)] * len(eqn.outvars)
        known |= {var for var, flag in zip(eqn.outvars, outs, strict=True) if flag}
    return [not hasattr(atom, "val") and atom in known for atom in jaxpr.outvars]
