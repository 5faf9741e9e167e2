"""The user's functions run in a measurement as if they had not run: what they write to in Python is put back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from lnp.state.places import places, references
from lnp.state.preserve import preserve_state, reachable_objects

FOREIGN = frozenset({"jax", "jaxlib"})
"""Packages whose objects are not entered: tracers lead to programs that are being traced."""
WRAPPED = ("__wrapped__", "fwd", "bwd")
"""Where what `jax.jit`, `jax.custom_vjp` and the like make of a function keeps it."""

_traces_for: Callable = getattr(jax, "make_user_context", lambda _: lambda _: contextlib.nullcontext())("the user")


@contextlib.contextmanager
def _not_strict() -> Iterator[None]:
    """JAX with its usual rules. What a function computes under strict ones it computes under these, and lnp's own
    arithmetic promotes types and ranks, moves constants to a device, and returns nan where there is no number.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.transfer_guard("allow"))
        for strict in (jax.debug_nans, jax.debug_infs, jax.check_tracer_leaks, jax.disable_jit):
            stack.enter_context(strict(False))
        yield


@contextlib.contextmanager
def leave_no_trace(*roots: Any) -> Iterator[None]:
    """For a whole measurement: what can be reached from models and functions holds afterwards what it held before.

    JAX remembers what it has traced. The next call of the user would find what was traced here, and its Python code
    would not run: what was traced meanwhile is remembered apart.
    """
    jax.effects_barrier()  # callbacks of the user's own steps, which may still be on their way
    with _kept(roots), _not_strict(), _traces_for("lnp"):
        yield
        jax.effects_barrier()


def restoring_state(function: Callable, *roots: Any) -> Callable:
    """The function from the same Python state at each call, random states included, so that all passes of a measurement
    are one function.
    """

    def run(*arguments: Any) -> Any:
        with _kept((function, *roots)):
            return function(*arguments)

    return run


def functions_behind(roots: list) -> list:
    """The functions behind what JAX has made of them."""
    found: dict[int, Any] = {}
    new = list(roots)
    while new:
        inside = [value for x in reachable_objects(new, FOREIGN) for value in _held(x)]
        functions = [getattr(value, name, None) for value in (*new, *inside) if _of_jax(value) for name in WRAPPED]
        new = list({id(f): f for f in functions if callable(f) and id(f) not in found}.values())
        found |= {id(f): f for f in new}
    return list(found.values())


def _kept(roots: Iterable[Any]) -> contextlib.AbstractContextManager[None]:
    known = [root for root in roots if root is not None]
    return preserve_state(*known, *functions_behind(known), foreign=FOREIGN)


def _held(x: Any) -> list:
    return [*references(x), *(value for part in places(x) if part.refers for value in part.take(x))]


def _of_jax(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in FOREIGN and callable(value)
