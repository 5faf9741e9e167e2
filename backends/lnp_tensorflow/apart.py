"""The samples of one batch taken apart, as far as its self-check lets them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import tensorflow as tf

from lnp.contract.linearization import Linearization, Subset, Vector, coupling_tolerance
from lnp.contract.options import Options
from lnp.estimators.signs import Signs
from lnp.per_sample.self_check import look
from lnp.per_sample.verdict import BENT, Verdict
from lnp_tensorflow import array_namespace as xp
from lnp_tensorflow.fallback import Norms, cut
from lnp_tensorflow.self_check import Checked, compared, look_at_one
from lnp_tensorflow.single_samples import Samples
from lnp_tensorflow.taps.backward_pass import Uses

Found = tuple[Norms, list[tf.Tensor]]
"""Numbers of single samples, and the outputs of each pass that was made for them."""


@dataclass
class Apart:
    """What the record offers of single samples, and the looks at what ran apart from the batch.

    Attributes
    ----------
    samples:
        All of the batch.
    g, flat:
        Loss gradient and outputs, (N, K).
    signs:
        Of probes; they tell which samples are drawn.
    uses:
        What the operations make of the parameters by g; None in micro-batches, and outside of graphs.
    general:
        (parameter without rules, why) pairs.
    wrong:
        Whether a rule differs from single samples, shape (), where that is known only when the graph runs; or None.
    flags:
        Whether the samples interact, as each look has found. Each of shape ().
    violations:
        As in `lnp.Linearization`.
    """

    samples: Samples
    g: tf.Tensor
    flat: tf.Tensor
    signs: Signs
    uses: Uses | None
    general: tuple[tuple[str, str], ...]
    wrong: tf.Tensor | None = None
    flags: list[tf.Tensor] = field(default_factory=list)
    violations: tuple[tuple[tf.Tensor, str], ...] = ()

    def __post_init__(self) -> None:
        self._graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()

    @property
    def notes(self) -> tuple[str, ...]:
        """Which parameters have no rules."""
        return Verdict(general=self.general).notes

    def offered_in(self, lin: Linearization) -> Linearization:
        """The record with what it has of single samples, which run one after the other where there are no rules."""
        norms, cost = self.square_norms, float(lin.outputs.shape[0]) if self.general else 1.0
        return replace(lin, sample_square_norms=norms, subset=self.subset, coupled=self.coupled, sample_cost=cost)

    def coupled(self) -> tf.Tensor:
        """Whether the samples have turned out to interact so far, shape ()."""
        return tf.reduce_any(tf.stack(self.flags)) if self.flags else tf.constant(False)

    def square_norms(self, v: tf.Tensor) -> Norms:
        """{parameter: (N,) array of ||J_n^T v_n||^2}."""
        return self._either(self.samples, None, lambda samples: samples.square_norms(v))

    def square_norms_of_gradient(self) -> Norms:
        """The same for the loss gradient, whose backward pass has run."""
        return self._either(self.samples, None, lambda samples: samples.square_norms(self.g, self.uses))

    def subset(self, size: int) -> Subset:
        """Samples drawn at random, with a forward pass of their own."""
        index, some = self._drawn(size)
        return Subset(index, lambda v: self._either(some, index, lambda samples: samples.square_norms(v)))

    def products(self, size: int, gradient: Vector) -> tuple[tf.Tensor, tf.Tensor]:
        """(M,) array of <J_m^T g_m, J^T g> of samples drawn at random, and which samples these are."""
        index, some = self._drawn(size)
        rows = tf.gather(self.g, index)

        def products(samples: Samples) -> Found:
            without = set(samples.general)
            uses = {name: many for name, many in (self.uses or {}).items() if name not in without}
            batch = self.samples.batch
            found = batch.inner_products(uses, gradient, index) if uses and batch is not None else {}
            missing = {name: part for name, part in gradient.items() if name not in found}
            single, passes = samples.inner_products(rows, missing) if missing else ({}, [])
            return {"all": tf.add_n([*found.values(), *single.values()])}, passes

        return self._either(some, index, products)["all"], index

    def _drawn(self, size: int) -> tuple[tf.Tensor, Samples]:
        """So many samples, in their order; the same ones at each call."""
        total, outputs = self.samples.shape
        size = min(size, total)
        index = self.signs.drawn(size)
        inputs = cut(self.samples.inputs, index, total)
        return index, replace(self.samples, inputs=inputs, shape=(size, outputs), batch=None)

    def _either(self, samples: Samples, index: tf.Tensor | None, numbers: Callable[[Samples], Found]) -> Norms:
        """Numbers of samples, index (M,) or all, by the rules where they are right, which may show only as it runs."""
        if self.wrong is not None:
            return tf.cond(self.wrong, lambda: numbers(samples.in_general())[0], lambda: numbers(samples)[0])
        found, passes = numbers(samples)
        if self._graph is None or tf.compat.v1.get_default_graph() is self._graph:  # nothing comes out of a loop
            rows = self.flat if index is None else tf.gather(self.flat, index)
            self.flags += [look(xp, rows, outputs) > self.tolerance for outputs in passes]
        return found

    @property
    def tolerance(self) -> float:
        """Relative difference that is rounding."""
        return coupling_tolerance(xp, self.samples.run.narrow)


def apart(
    samples: Samples,
    g: tf.Tensor,
    magnitude: tf.Tensor,
    flat: tf.Tensor,
    cotangents: list | None,
    signs: Signs,
    options: Options,
    checked: Checked | None,
    turn: tf.Tensor | None,
) -> tuple[Apart | None, tuple[str, ...]]:
    """Samples taken apart, or None; and notes. Without a verdict that is remembered the self-check is made here.

    Parameters
    ----------
    g, magnitude:
        The loss gradient (N, K), divided by this.
    cotangents:
        At the taps of the batch, by g, or None.
    turn:
        The number of the measurement, shape (): another sample is looked at each time.
    """
    if not options.split:
        return None, ()
    wrong, flags = None, []
    if checked is None:
        found = compared(samples.run, samples.inputs, samples.microbatch, samples.batch, thorough=False)
        if found.reason:
            return None, (found.reason,)
        general, expanded, wrong, flags = tuple(found.missing.items()), found.expanded, found.wrong, [found.coupled]
    else:
        general, expanded = checked.verdict.general, checked.expanded
    samples = replace(samples, general=tuple(name for name, _ in general), expanded=expanded)
    uses = None
    if samples.batch is not None and cotangents is not None:
        uses = samples.uses(samples.batch, cotangents)
    made = Apart(samples, g, flat, signs, uses, general, wrong, flags)
    if checked is not None and turn is not None and samples.shape[0] > 1:
        seen = look_at_one(samples, g, magnitude, flat, uses, turn)
        made.flags.append(seen.apart > made.tolerance)
        made.violations = () if seen.bend is None else ((seen.bend > made.tolerance, BENT),)
    return made, made.notes
