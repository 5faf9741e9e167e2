"""Loops of the core in JAX: what may run once at most is a branch, which compiles to less than a loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core


def while_loop(going: Callable, body: Callable, state: Any) -> Any:
    """`jax.lax.while_loop`, but for what runs once at most."""
    return run_if_entered(going, body, state, lambda state: jax.lax.while_loop(going, body, state))


def run_if_entered(going: Callable, body: Callable, state: Any, loop: Callable[[Any], Any]) -> Any:
    """The state after `loop(state)`, where the condition holds at first; what ends after one turn is no loop."""
    entered = going(state)
    arrays = jax.tree.map(jnp.asarray, state)
    if isinstance(entered, bool):
        return loop(arrays) if entered else arrays
    one_turn = isinstance(state[0], int) and state[0] == 0 and ends_after_one(going, state)
    return jax.lax.cond(entered, body if one_turn else loop, lambda arrays: arrays, arrays)


def ends_after_one(going: Callable, state: tuple) -> bool:
    """Whether a loop that counts in state[0] is over at 1, whatever it finds: its condition is false then, whichever
    values the flags have that it takes from outside.
    """
    program = jax.make_jaxpr(lambda: going((1, *state[1:])))()
    if any(jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.bool_) for value in program.consts):
        return False
    with jax.ensure_compile_time_eval():
        choices = itertools.product(map(jnp.asarray, (False, True)), repeat=len(program.consts))
        return not any(core.jaxpr_as_fun(core.ClosedJaxpr(program.jaxpr, flags))()[0] for flags in choices)
