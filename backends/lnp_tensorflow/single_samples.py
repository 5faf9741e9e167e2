"""Numbers of single samples' gradients: by the rules for a network's operations, one sample at a time without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from lnp_tensorflow.fallback import Groups, Norms, dot, square_norm
from lnp_tensorflow.outputs import flatten
from lnp_tensorflow.replay import Forward
from lnp_tensorflow.taps.backward_pass import Tapped, Uses, recorded


@dataclass(frozen=True)
class Samples:
    """Some samples, each taken by itself.

    Attributes
    ----------
    run, inputs:
        The model and what goes in.
    shape, dtype:
        Of the outputs, (N, K).
    general:
        Parameters whose single samples are run on their own.
    expanded:
        As in `Tapped`, where the rules were compared with single samples: another number of samples, which may happen
        to be another size in the network, must not be read in another way.
    batch:
        The samples after a forward pass, or None to run one when it is needed, in micro-batches of
    microbatch:
        samples.
    """

    run: Forward
    inputs: Any
    shape: tuple[int, int]
    dtype: tf.DType
    general: tuple[str, ...] = ()
    expanded: tuple[str, ...] = ()
    batch: Tapped | None = None
    microbatch: int | None = None

    def one_by_one(self, wanted: tuple[str, ...] | None = None) -> Groups:
        """Each sample in a pass of its own."""
        return Groups(self.run, self.inputs, self.shape, self.dtype, wanted=wanted)

    def in_general(self) -> Samples:
        """The same without any rules."""
        return replace(self, general=tuple(self.run.sources))

    def uses(self, batch: Tapped, cotangents: list) -> Uses:
        """What the operations make of the parameters whose rules are right."""
        other = () if batch.expanded == self.expanded else (*batch.expanded, *self.expanded)
        return batch.uses(cotangents, {*self.general, *other})[0]

    def square_norms(self, v: tf.Tensor, uses: Uses | None = None) -> tuple[Norms, list[tf.Tensor]]:
        """{parameter: (N,) array of ||J_n^T v_n||^2}, and the outputs (N, K) of each pass that was made for them.

        `uses` are those of the batch by this v, if they are known.
        """
        names = tuple(self.run.sources)
        return self._each(v, names, uses, lambda batch, uses: batch.square_norms(uses), lambda name, g: square_norm(g))

    def inner_products(self, v: tf.Tensor, u: Mapping[str, tf.Tensor]) -> tuple[Norms, list[tf.Tensor]]:
        """{parameter: (N,) array of <J_n^T v_n, u>} of the parameters that u has, and outputs as above."""

        def by_rules(batch: Tapped, uses: Uses) -> Norms:
            return batch.inner_products(uses, u, tf.range(batch.samples))

        return self._each(v, tuple(u), None, by_rules, lambda name, g: dot(g, u[name]))

    def _each(
        self, v: tf.Tensor, names: tuple[str, ...], uses: Uses | None, by_rules: Callable, by_gradient: Callable
    ) -> tuple[Norms, list[tf.Tensor]]:
        """Numbers by_rules(batch, uses) where there are rules, elsewhere by_gradient(name, gradient); and outputs."""
        if self.microbatch is not None and self.microbatch < self.shape[0]:

            def of_group(inputs: Any, v: tf.Tensor) -> Norms:
                part = replace(self, inputs=inputs, shape=tuple(v.shape), batch=None, microbatch=None)
                return part._each(v, names, None, by_rules, by_gradient)[0]

            return replace(self.one_by_one(names), size=self.microbatch).each(of_group, v), []
        known: Norms = {}
        passes: list[tf.Tensor] = []
        if not set(names) <= set(self.general):
            batch = self.batch or recorded(self.run, self.inputs, self.shape[0])
            passes += [] if self.batch else [flatten(batch.outputs)]
            if batch.samples == 1:
                gradient = batch.pulled(v)[0]
                return {n: tf.cast(by_gradient(n, gradient[n]), self.dtype)[None] for n in names}, passes
            if uses is None:
                uses = self.uses(batch, batch.pulled(v, gradient=False)[1])
            known = by_rules(batch, {name: uses[name] for name in names if name in uses})
        missing = tuple(name for name in names if name not in known)
        if missing:
            outputs, single = self.one_by_one(missing).numbers(v, by_gradient)
            known, passes = known | single, [*passes, outputs]
        return {name: known[name] for name in names}, passes
