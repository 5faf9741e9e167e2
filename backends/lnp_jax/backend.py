"""The backend's entry points: evaluate (compiled), linearize, and the pure form for use inside jax.jit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import jax
import numpy as np

import lnp
from lnp.contract import validation
from lnp.contract.linearization import Linearization
from lnp.contract.options import Options
from lnp.parameter_texts import parameters_of
from lnp.per_sample.verdict import BENT, Verdict
from lnp.results.computations import changes, measured_change, predicted_change
from lnp.results.preconditioner import DecomposePreconditioned
from lnp_jax.compile_cache import Answer, Plan, check_hashable, measure, run
from lnp_jax.inside_jit import refuse_varying, share_nothing
from lnp_jax.meshes import automatic
from lnp_jax.model import Arrays, Structure, accepts, check_alive, separate
from lnp_jax.observed import without_states
from lnp_jax.processes import fetched, meet, refuse_spanning
from lnp_jax.python_state import hashable, loss_state, with_python_state
from lnp_jax.record import record
from lnp_jax.self_check import (
    NOT_ASKED,
    find_verdict,
    known_verdict,
    remember_interacting,
    traced,
)
from lnp_jax.shards import together
from lnp_jax.signs import as_words
from lnp_jax.state_guard import leave_no_trace
from lnp_jax.updates import update_vector

__all__ = ["accepts", "decompose", "evaluate", "linearize"]

OF_THE_GRADIENT = (measured_change, predicted_change, changes)
"""Computations about the loss's own gradient, which is what the backward pass says, whether it is linear or not."""


@parameters_of(lnp.decompose)
def decompose(
    apply: Callable,
    parameters: Any,
    batch: Any,
    key: Any,
    *,
    group: str | tuple[str, ...] | None = None,
    **options: Any,
) -> lnp.Decomposition:
    """`lnp.decompose((apply, parameters), batch, seed=key, ...)`, pure: for use inside `jax.jit`, `jax.lax.scan`,
    `jax.shard_map` and the like.

    Returns arrays of shape () there. Checks on values cannot raise inside a compiled function: where labels are out
    of range, or samples that were taken apart turn out to interact, the numbers are nan.

    Parameters
    ----------
    apply:
        `apply(parameters, inputs) -> outputs`.
    parameters:
        What it is differentiated by: a pytree of arrays.
    key:
        Of the random signs, in the place of a seed; the same on all devices that measure together.
    group:
        Inside of `jax.shard_map` or `jax.pmap`: the axis, or axes, of the mesh along which devices hold parts of one
        batch, of equal sizes, with the same parameters. Every device gets the result of the whole batch. None: each its
        own part's. Outside, arrays with a `NamedSharding` are measured as one batch in any case.
    batch, loss, by_layer, population, estimator, rtol, max_probes, loss_terms, microbatch, batch_statistics:
        As for `lnp.decompose`.

    Raises
    ------
    TypeError, ValueError
        For a model, batch, loss or option that cannot be used; inside of `jax.shard_map` with `check_vma=True`, and for
        a network or a loss that talks to other devices there.

    >>> import jax, jax.numpy as jnp
    >>> @jax.jit
    ... def position(w, x, y, key):
    ...     return decompose(lambda w, x: x @ w, w, (x, y), key).chi_pos
    >>> float(position(jnp.zeros((2, 1)), jnp.eye(2), jnp.ones((2, 1)), jax.random.key(0)))
    0.5
    """
    with together(group):
        return lnp.decompose((apply, parameters), batch, seed=key, **options)


def evaluate(computation: Callable, model: Any, batches: tuple, options: Options, **operands: Any) -> Any:
    """Run the computation compiled; numbers come back in one transfer. Inside a compiled function: as arrays."""
    with leave_no_trace(model, options.loss, options.forward):
        return _evaluated(computation, model, batches, options, operands)


def _evaluated(computation: Callable, model: Any, batches: tuple, options: Options, operands: dict[str, Any]) -> Any:
    """What `evaluate` returns, while what the model holds in Python is kept."""
    structure, arrays = separate(model, options.forward, options.parameters)
    check_alive(arrays)
    here = automatic((arrays, batches))
    arrays, batches, operands = here.placed((arrays, batches, operands))
    options = replace(options, seed=here.placed(as_words(options.seed)))
    with here.axes():
        here.refuse(structure.call, arrays, validation.unpack(batches[0])[0])
        return _measured(computation, structure, arrays, model, batches, options, operands)


def _measured(
    computation: Callable, structure: Structure, arrays: Arrays, model: Any, batches: tuple, options: Options,
    operands: dict[str, Any],
) -> Any:  # fmt: skip
    """What `evaluate` returns, with arrays that lie on automatic axes."""
    structure = without_states(structure, arrays, validation.unpack(batches[0])[0])
    inside_jit = traced((arrays, batches, options.seed, operands))
    refuse_varying((arrays, batches))
    structure = with_python_state(structure, model, arrays, batches[0], inside_jit)
    if operands.get("update") is not None:
        diagonal = isinstance(computation, DecomposePreconditioned)
        operands = operands | {"update": update_vector(structure, arrays, model, operands["update"], diagonal)}
    plan = Plan(computation, structure, replace(options, seed=None, parameters=None))
    dynamic = (arrays, batches, options.seed, operands)
    if computation in OF_THE_GRADIENT:
        plan = replace(plan, verdicts=(NOT_ASKED,) * len(batches))
    if inside_jit:
        return share_nothing(lambda: measure(_with_known_verdicts(plan, arrays, batches), *dynamic).result)
    check_hashable(plan)
    meet(dynamic)
    if plan.verdicts is None:
        found = tuple(find_verdict(structure, arrays, batch, plan.options) for batch in batches)
        _raise_bent(found)
        plan = replace(plan, verdicts=found)
    plan = replace(plan, losses=tuple(loss_state(options.loss, structure, arrays, batch) for batch in batches))
    answer, notes = _run_checked(plan, dynamic)
    _raise(answer)
    return _noted(jax.tree.map(_to_number, answer.result), notes)


def _noted(result: Any, notes: tuple[str, ...]) -> Any:
    """The result with more notes, where it has any."""
    return replace(result, notes=(*result.notes, *notes)) if notes and hasattr(result, "notes") else result


def _run_checked(plan: Plan, dynamic: tuple) -> tuple[Answer, tuple[str, ...]]:
    """The answer on the host, and notes. Samples that turn out to interact, whatever was found before, are measured
    jointly, now and later.
    """
    answer, notes = run(plan, *dynamic)
    answer = fetched(answer)
    if not any(answer.coupled):
        return answer, notes
    arrays, batches, *_ = dynamic
    jointly = [
        remember_interacting(plan.structure, arrays, batch, plan.options) if coupled else verdict
        for batch, verdict, coupled in zip(batches, plan.verdicts or (), answer.coupled, strict=True)
    ]
    answer, more = run(replace(plan, verdicts=tuple(jointly)), *dynamic)
    return fetched(answer), (*notes, *more)


def linearize(model: Any, batch: Any, options: Options) -> Linearization:
    """The record for one batch, not compiled."""
    with leave_no_trace(model, options.loss, options.forward):
        structure, arrays = separate(model, options.forward, options.parameters)
        check_alive(arrays)
        here = automatic((arrays, batch))
        here.refuse_context()
        arrays, batch = here.placed((arrays, batch))
        options = replace(options, seed=here.placed(as_words(options.seed)))
        structure = without_states(structure, arrays, validation.unpack(batch)[0])
        inside_jit = traced((arrays, batch, options.seed))
        refuse_spanning((arrays, batch))
        structure = with_python_state(structure, model, arrays, batch, inside_jit)
        if inside_jit:
            return record(structure, arrays, batch, options.seed, options, None)
        verdict = find_verdict(structure, arrays, batch, options)
        _raise_bent([verdict])
        return record(structure, arrays, batch, options.seed, options, verdict)


def _with_known_verdicts(plan: Plan, arrays: Arrays, batches: tuple) -> Plan:
    """The plan with the verdicts that calls outside of compiled functions have found, if there are any."""
    if plan.verdicts is not None or not hashable(plan.structure):
        return plan
    found = [known_verdict(plan.structure, arrays, batch, plan.options) for batch in batches]
    return plan if None in found else replace(plan, verdicts=tuple(verdict for verdict in found if verdict is not None))


def _raise_bent(verdicts: Iterable[Verdict]) -> None:
    if any(verdict.bent for verdict in verdicts):
        raise ValueError(BENT)


def _raise(answer: Any) -> None:
    for violated, message in zip(answer.violated, answer.messages, strict=True):
        if violated:
            raise ValueError(message)


def _to_number(leaf: Any) -> Any:
    return np.asarray(leaf).item() if np.ndim(leaf) == 0 else leaf
