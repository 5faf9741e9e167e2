"""The passes of a measurement: those of the batch's own function, and those of its samples taken apart.

Loss, outputs and J^T v always come from the user's function on the batch. Single samples, which may be run apart only
if they do not interact, tell nothing but their squared norms.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from lnp_jax import fallback
from lnp_jax.bound_model import Network
from lnp_jax.taps.backward_pass import Norms, Tapped

SquareNorms = Callable[[jax.Array], Norms]
"""v (N, K) -> {name: (N,) array of ||J_n^T v_n||^2}."""


@dataclass(frozen=True)
class BatchPasses:
    """The batch's own function.

    Attributes
    ----------
    outputs:
        f, shape (N, K).
    run:
        parameters -> f.
    pull:
        v -> J^T v.
    """

    outputs: jax.Array
    run: Callable[[Mapping], jax.Array]
    pull: Callable[[jax.Array], Mapping[str, jax.Array]]


def of_batch(net: Network, micro: fallback.Micro | None) -> BatchPasses:
    """The passes of the whole batch, or of one micro-batch after the other."""
    if micro is not None:
        return BatchPasses(micro.outputs(net.parameters), micro.outputs, lambda v: micro.pulled(net.parameters, v))
    run = jax.jit(net.whole)  # for eager callers: one program, not one per operation
    outputs, pullback = jax.vjp(run, dict(net.parameters))
    return BatchPasses(outputs, run, lambda v: pullback(v)[0])


@dataclass
class SamplePasses:
    """The samples on their own.

    Attributes
    ----------
    outputs:
        What they give on their own, shape (N, K).
    g:
        The loss gradient.
    of_g:
        Squared norms of its samples.
    along:
        <J_m^T g_m, sum_n J_n^T g_n> of some samples, shape (M,), where taps are to tell them; or None.
    pull:
        Squared norms for other cotangents.
    again:
        () -> the same by a forward pass of its own, for a loop; or None.
    """

    outputs: jax.Array
    g: jax.Array
    of_g: Norms
    along: jax.Array | None
    pull: SquareNorms
    again: Callable[[], SquareNorms] | None = None

    def square_norms(self, v: jax.Array) -> Norms:
        """Squared norms for a cotangent; those for the loss gradient are known."""
        return self.of_g if v is self.g else self.pull(v)

    def while_loop(self, going: Callable, body: Callable, state: Any) -> Any:
        """`jax.lax.while_loop` with a forward pass of its own if it is entered.

        Outside a loop XLA computes again what is cheap instead of keeping it between forward and backward pass. A loop
        would make it keep everything, whether the loop is entered or not.
        """

        def loop(state: Any) -> Any:
            outside, again = self.pull, self.again
            if again is not None:
                self.pull, self.again = again(), None
            try:
                return jax.lax.while_loop(going, body, state)
            finally:
                self.pull, self.again = outside, again

        return entered_if_needed(going, body, state, loop)


def of_samples(
    net: Network, taps: Tapped, micro: fallback.Micro | None, g: jax.Array, index: jax.Array | None
) -> SamplePasses:
    """The passes of all samples, with inner products for those of the index."""
    rows = net.split.rows
    if micro is None:
        outputs, pull = taps.forward(rows, index)
        of_g = pull(g)
        norms_by = lambda pull: lambda v: pull(v).norms
        return SamplePasses(
            outputs, g, of_g.norms or {}, of_g.along, norms_by(pull), lambda: norms_by(taps.forward(rows)[1])
        )

    def part(arrays: list) -> tuple[tuple, tuple]:
        outputs, pull = taps.forward(arrays[:-1])
        return (), (outputs, pull(arrays[-1]).norms)

    pulled = lambda v: micro.visited(part, [*rows, v])[1]
    outputs, of_g = pulled(g)
    return SamplePasses(outputs, g, of_g, None, lambda v: pulled(v)[1])


def entered_if_needed(going: Callable, body: Callable, state: Any, loop: Callable) -> Any:
    """The state after `loop`; what may be run once at most is no loop."""
    entered = going(state)
    arrays = jax.tree.map(jnp.asarray, state)
    if isinstance(entered, bool):
        return loop(arrays) if entered else arrays
    once = isinstance(state[0], int) and state[0] == 0 and ends_after_one(going, state)
    return jax.lax.cond(entered, body if once else loop, lambda arrays: arrays, arrays)


def while_loop(going: Callable, body: Callable, state: Any) -> Any:
    """`jax.lax.while_loop`, but for what runs once at most."""
    return entered_if_needed(going, body, state, lambda state: jax.lax.while_loop(going, body, state))


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
