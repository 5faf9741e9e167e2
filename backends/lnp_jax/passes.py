"""The passes of a measurement: those of the batch's own function, and those of its samples taken apart.

Loss, outputs and J^T v always come from the user's function on the batch. Single samples, which may be run apart only
if they do not interact, tell nothing but their squared norms, and whether they are what they are in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lnp.contract.linearization import Vector
from lnp.per_sample.differences import SquareNorms
from lnp_jax.bound_model import Network
from lnp_jax.fallback import Micro
from lnp_jax.loops import run_if_entered
from lnp_jax.taps.backward_pass import Tapped

Pull = Callable[[jax.Array], tuple[Vector, SquareNorms]]
"""v (N, K) -> (sums of single samples' gradients of some parameters, {name: (N,) array of ||J_n^T v_n||^2})."""


@dataclass(frozen=True)
class BatchPasses:
    """The batch's own function.

    Attributes
    ----------
    parameters:
        {name: array}, around which it is linearised.
    outputs:
        f, shape (N, K).
    run:
        parameters -> f.
    pull:
        v -> J^T v.
    custom_backward:
        Whether it holds a backward pass that the user wrote, through which JAX has no Jacobian-vector products.
    """

    parameters: Vector
    outputs: jax.Array
    run: Callable[[Mapping], jax.Array]
    pull: Callable[[jax.Array], Vector]
    custom_backward: bool

    def jvp(self, u: Mapping) -> jax.Array:
        """J u, shape (N, K): by forward mode, or as the transpose of v -> J^T v, which is linear."""
        tangents = {name: u[name].astype(p.dtype) for name, p in self.parameters.items()}
        if self.custom_backward:
            return jax.vjp(self.pull, jnp.zeros_like(self.outputs))[1](tangents)[0]
        return jax.jvp(self.run, (dict(self.parameters),), (tangents,))[1]


def batch_passes(net: Network, micro: Micro | None) -> BatchPasses:
    """The passes of the whole batch, or of one micro-batch after the other."""
    parameters = dict(net.parameters)
    if micro is not None:

        def pull(v: jax.Array) -> Vector:
            return micro.pulled(parameters, v)

        return BatchPasses(parameters, micro.outputs(parameters), micro.outputs, pull, net.custom_backward)
    run = jax.jit(net.batch_outputs)  # for eager callers: one program, not one per operation
    outputs, pullback = jax.vjp(run, parameters)
    return BatchPasses(parameters, outputs, run, lambda v: pullback(v)[0], net.custom_backward)


class SamplePasses:
    """The samples of a batch on their own: a forward pass, and squared norms by what pulls back through it."""

    def __init__(self, net: Network, taps: Tapped, micro: Micro | None) -> None:
        self.net, self.taps = net, taps
        self._micro = None if micro is None else replace(micro, split=net.split)
        self._outputs: jax.Array | None = None
        if micro is None:
            self._outputs, self._pull = self._forward()

    @property
    def outputs(self) -> jax.Array:
        """What the samples give on their own, shape (N, K)."""
        if self._outputs is None:
            assert self._micro is not None, "a whole batch has run when this was made"

            def forward(rows: list) -> tuple[tuple, jax.Array]:
                return ((), self.taps.forward(rows)[0])

            self._outputs = self._micro.visit(forward, self.net.split.rows)[1]
        return self._outputs

    def square_norms(self, v: jax.Array) -> SquareNorms:
        """{name: (N,) array of ||J_n^T v_n||^2}."""
        return self._pull(v)[1] if self._micro is None else self._pulled(v)[2]

    def loss_gradient(self, g: jax.Array) -> tuple[Vector, SquareNorms]:
        """(Sums of single samples' gradients, for a few small parameters; squared norms), outside of any loop."""
        if self._micro is None:
            return self._pull(g)
        sums, self._outputs, norms = self._pulled(g)
        return sums, norms

    def some(self, index: jax.Array) -> SamplePasses:
        """The same of some samples, with a forward pass of their own."""
        return SamplePasses(self.net.some(index, len(index)), self.taps, self._micro)

    def while_loop(self, going: Callable, body: Callable, state: Any) -> Any:
        """`jax.lax.while_loop` with a forward pass of its own if it is entered.

        Outside a loop XLA computes again what is cheap instead of keeping it between forward and backward pass. A loop
        would make it keep everything, whether the loop is entered or not.
        """

        def loop(state: Any) -> Any:
            if self._micro is not None:
                return jax.lax.while_loop(going, body, state)
            outside, (_, self._pull) = self._pull, self._forward()
            try:
                return jax.lax.while_loop(going, body, state)
            finally:
                self._pull = outside

        return run_if_entered(going, body, state, loop)

    def _forward(self) -> tuple[jax.Array, Pull]:
        """(outputs (N, K), what pulls back) of a new forward pass of all samples at once."""
        outputs, pull = self.taps.forward(self.net.split.rows)

        def of_some(v: jax.Array) -> tuple[Vector, SquareNorms]:
            gradient, norms = pull(v)
            return {name: gradient[name] for name in self.taps.summed}, norms

        return outputs, of_some

    def _pulled(self, v: jax.Array) -> tuple[Vector, jax.Array, SquareNorms]:
        """(sums of gradients, outputs, squared norms), one micro-batch after the other."""
        assert self._micro is not None, "a whole batch keeps its forward pass"

        def part(arrays: list) -> tuple[Vector, tuple]:
            outputs, pull = self.taps.forward(arrays[:-1])
            gradient, norms = pull(arrays[-1])
            return {name: gradient[name] for name in self.taps.summed}, (outputs, norms)

        sums, (outputs, norms) = self._micro.visit(part, [*self.net.split.rows, v])
        return sums, outputs, norms
