"""Compiled once per model structure, computation and shapes; the code of the latest is kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from lnp.contract import recompiled
from lnp.contract.options import Options
from lnp.per_sample.verdict import Verdict
from lnp_jax.model import Arrays, Structure
from lnp_jax.python_state import shapes_of
from lnp_jax.record import record

KEPT = 16
"""Measurements whose compiled code is kept: 5 to 20 MB each."""


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


_COMPILED: OrderedDict[Any, Callable] = OrderedDict()
"""{plan, and the shapes of all that is passed: a compiled function of its own, which takes its code with it}."""


def program(plan: Plan) -> Callable:
    """The measurement of a plan, to be compiled."""
    return jax.jit(partial(measure, plan))


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
    shapes = shapes_of((arrays, batches, operands))
    compiled = _COMPILED.pop((plan, shapes), None)
    new = compiled is None
    if compiled is None:
        compiled = program(plan)
    answer = compiled(arrays, batches, seed, operands)
    recompiled.keep_last(_COMPILED, (plan, shapes), compiled, KEPT)
    if not new:
        return answer, ()
    functions = plan.structure.static, plan.structure.forward, plan.options.loss
    return answer, recompiled.compiled(functions, (plan.computation, *functions[:2]), shapes, KEPT)
