"""Compiled once per model structure, computation and shapes; notices what defeats that."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from lnp.contract.options import Options
from lnp.per_sample.verdict import Verdict
from lnp_jax.model import Arrays, Structure
from lnp_jax.record import record

REPEATS = 3
"""Compilations for the same code in new function objects after which the user is told."""
REMEMBERED = 256


@dataclass(frozen=True)
class Plan:
    """All that is fixed when a measurement is compiled; equal plans share the compiled code.

    The verdicts say for each batch how its samples are taken apart; None where that cannot be known yet, inside the
    user's own compiled function. `losses` are digests of the loss's program for each batch.
    """

    computation: Callable
    structure: Structure
    options: Options
    verdicts: tuple[Verdict, ...] | None = None
    losses: tuple[str, ...] = ()


@partial(jax.tree_util.register_dataclass, data_fields=["result", "violated", "coupled"], meta_fields=["messages"])
@dataclass(frozen=True)
class Answer:
    """What a measurement returns: the computation's result, the checks on values, and for each batch whether its
    samples turned out to interact (None where they were not taken apart).
    """

    result: Any
    violated: tuple
    coupled: tuple
    messages: tuple[str, ...]


def measure(plan: Plan, arrays: Arrays, batches: tuple, seed: Any, operands: dict[str, Any]) -> Answer:
    """Linearise each batch and compute. Pure."""
    verdicts = plan.verdicts or [None] * len(batches)
    records = [
        record(plan.structure, arrays, batch, seed, plan.options, verdict)
        for batch, verdict in zip(batches, verdicts, strict=True)
    ]
    checks = [check for lin in records for check in lin.violations]
    return Answer(
        plan.computation(*records, **operands),
        tuple(flag for flag, _ in checks),
        tuple(None if lin.coupled is None else lin.coupled() for lin in records),
        tuple(message for _, message in checks),
    )


def _counted(plan: Plan, arrays: Arrays, batches: tuple, seed: Any, operands: dict[str, Any]) -> Answer:
    _TRACED.append(plan)  # runs when it is traced, not when it is called
    return measure(plan, arrays, batches, seed, operands)


_TRACED: list[Plan] = []
_compiled = jax.jit(_counted, static_argnums=0)
_SEEN: OrderedDict[Any, tuple[weakref.ref, int]] = OrderedDict()


def check_hashable(plan: Plan) -> None:
    """Raise TypeError unless compiled code can be found again by the plan."""
    try:
        hash(plan)
    except TypeError as error:
        raise TypeError(
            f"The model's structure, loss or forward cannot be hashed ({error}), which compiled code is found by. "
            "Expected hashable static fields: tuples instead of lists, no arrays. Change them, or pass "
            "(apply, parameters)."
        ) from error


def run(
    plan: Plan, arrays: Arrays, batches: tuple, seed: Any, operands: dict[str, Any]
) -> tuple[Answer, tuple[str, ...]]:
    """The answer of the compiled measurement, and notes on the compilation."""
    _TRACED.clear()
    answer = _compiled(plan, arrays, batches, seed, operands)
    functions = [plan.structure.static, plan.structure.forward, plan.options.loss] if _TRACED else []
    notes = tuple(note for function in functions for note in _noticed(function))
    _TRACED.clear()
    return answer, notes


def _noticed(function: Any) -> Iterable[str]:
    """A note if this function was compiled for again and again, each time as a new object with the same code."""
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    code = getattr(inner, "__code__", None)
    if code is None or getattr(inner, "__self__", None) is not None:
        return
    last, count = _SEEN.pop(code, (None, 0))
    count += last is not None and last() is not function
    _SEEN[code] = (weakref.ref(function), count)
    while len(_SEEN) > REMEMBERED:
        _SEEN.popitem(last=False)
    if count >= REPEATS:
        text = (
            f"lnp compiled again because {inner.__qualname__} is a new function object, as {count} times before. "
            "If it is made in a loop, define it once, outside, and pass the same object."
        )
        if count == REPEATS:
            warnings.warn(text, stacklevel=5)
        yield text
