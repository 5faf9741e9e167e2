"""Squared norms of single samples' gradients, from the cotangents where data meet parameters.

Nothing of size samples x parameters, and no pass through the weights: one backward pass to the operations that use
parameters tells what each of them does, and `lnp.per_sample.norms` does the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import tensorflow as tf

from lnp.contract.trees import leaves, map_leaves
from lnp.per_sample import norms
from lnp_tensorflow import array_namespace as xp
from lnp_tensorflow import effects
from lnp_tensorflow.fallback import Gradients, has_samples
from lnp_tensorflow.outputs import parts, split, wide
from lnp_tensorflow.replay import Forward, operations
from lnp_tensorflow.taps.convolution import convolution
from lnp_tensorflow.taps.frames import along
from lnp_tensorflow.taps.graph import walk
from lnp_tensorflow.taps.rules import Unread, Use, used
from lnp_tensorflow.taps.views import Step, origins

Norms = dict[str, tf.Tensor]
"""{parameter: (N,) squared norms}."""
Uses = dict[str, list[Use]]
"""{parameter: what the operations make of it}."""


@dataclass(frozen=True)
class Site:
    """One way from an operation that meets the data back to a parameter.

    Attributes
    ----------
    name:
        Of the parameter.
    tap:
        The operation's number among those that are tapped.
    op, place:
        The operation, and which of its inputs leads to the parameter.
    steps:
        From that input to the parameter.
    """

    name: str
    tap: int
    op: tf.Operation
    place: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Tapped:
    """A recorded forward pass of some samples.

    Attributes
    ----------
    returned:
        What the model returned.
    outputs:
        The floating-point leaves of it.
    sources:
        {parameter: tensor or variable that is differentiated by}.
    tape:
        Of the pass.
    samples:
        N.
    taps:
        Outputs of the operations that are tapped.
    sites:
        What they are read for.
    general:
        {parameter that is not read: the operation that is not known}.
    expanded:
        Parameters whose rows are taken to become one for each sample somewhere, once for each place.
    """

    returned: Any
    outputs: list[tf.Tensor]
    sources: dict[str, Any]
    tape: tf.GradientTape
    samples: int
    taps: tuple[tf.Tensor, ...] = ()
    sites: tuple[Site, ...] = ()
    general: dict[str, str] = field(default_factory=dict)
    expanded: tuple[str, ...] = ()

    def pulled(self, v: tf.Tensor, gradient: bool = True) -> tuple[Gradients, list]:
        """(J^T v, cotangents at the taps), by one backward pass. Where nothing arrives: zero, and None."""
        sources = self.sources if gradient else {}
        cotangents = split(v, self.outputs)
        found = self.tape.gradient(self.outputs, [*sources.values(), *self.taps], cotangents)
        grads = {
            name: tf.zeros(source.shape, source.dtype) if grad is None else grad
            for (name, source), grad in zip(sources.items(), found, strict=False)
        }
        return grads, found[len(sources) :]

    def uses(self, cotangents: list, skip: Iterable[str] = ()) -> tuple[Uses, dict[str, str]]:
        """({parameter: what it is used for}, {other parameter: why it cannot be read})."""
        unread = {**dict.fromkeys(skip, ""), **self.general}
        uses: Uses = {name: [] for name in self.sources}
        for site in self.sites:
            if site.name in unread:
                continue
            try:
                uses[site.name].append(self._use(site, cotangents[site.tap]))
            except Unread as error:
                unread[site.name] = str(error)
        unread |= {n: "several uses" for n, many in uses.items() if n not in unread and not _combine(many)}
        return {name: many for name, many in uses.items() if name not in unread}, unread

    def square_norms(self, uses: Uses) -> Norms:
        """{parameter: (N,) squared norms}, zero for what is not used."""
        zero = tf.zeros(self.samples, wide(self.outputs))
        return {name: _square_norm(many, self.samples) if many else zero for name, many in uses.items()}

    def along(self, uses: Uses, u: Mapping[str, tf.Tensor], index: tf.Tensor | None = None) -> Norms:
        """{parameter: (N,) inner products with u}, or (M,) of some samples."""
        zero = tf.zeros(self.samples if index is None else index.shape[0], wide(self.outputs))
        return {
            name: sum((along(use, u[name], index, self.samples) for use in many), start=zero)
            for name, many in uses.items()
        }

    def _use(self, site: Site, d: Any) -> Use:
        if d is None:
            raise Unread("a gradient of its own")
        use = used(site.op, site.place, tf.convert_to_tensor(d), self.samples)
        for step in site.steps:
            use = step(use, self.samples)
        return Use(use.kind, tuple(_comparable(factor) for factor in use.factors), use.frame)


def recorded(run: Forward, inputs: Any) -> Tapped:
    """Run the model. In a graph, with taps."""
    if tf.executing_eagerly():
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(list(run.sources.values()))
            returned = run(inputs)
        return _plain(returned, run.sources, tape)
    graph = tf.compat.v1.get_default_graph()
    inputs = map_leaves(lambda leaf: tf.identity(leaf) if isinstance(leaf, tf.Tensor) else leaf, inputs)
    sources = run.sources
    if run.structure.kind == "function":
        sources = {name: tf.identity(tensor) for name, tensor in sources.items()}
        parameters = {tensor.name: name for name, tensor in sources.items()}
    else:
        parameters = {graph.capture(variable.handle).name: name for name, variable in sources.items()}
    before = operations()
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(list(sources.values()))
        returned = run(inputs, sources)
    plain = _plain(returned, sources, tape)
    if not all(isinstance(out, tf.Tensor) and out.shape.is_fully_defined() for out in plain.outputs):
        return plain
    made = graph.get_operations()[before:]
    data = [leaf.name for leaf in leaves(inputs) if has_samples(leaf, plain.samples)]
    return _with_taps(plain, made, parameters, data)


def _plain(returned: Any, sources: dict[str, Any], tape: tf.GradientTape) -> Tapped:
    outputs = parts(returned)
    samples = outputs[0].shape[0] if outputs and outputs[0].shape.rank else 0
    return Tapped(returned, outputs, sources, tape, samples, general=dict.fromkeys(sources, "not traced"))


def _with_taps(plain: Tapped, made: list[tf.Operation], parameters: dict[str, str], data: list[str]) -> Tapped:
    seen = walk(made, parameters, data, plain.samples)
    names = effects.reaching(made, plain.outputs)
    taps: list[tf.Tensor] = []
    sites: list[Site] = []
    general: dict[str, str] = {}
    expanded: list[str] = []
    for out in plain.outputs:
        if out.name not in seen.data:
            general |= dict.fromkeys(seen.origins.get(out.name, ()), "an output without data")
    for frontier in seen.frontiers:
        op = frontier.op
        if op.name not in names:
            continue
        for place in frontier.places:
            paths, lost = origins(op.inputs[place], seen)
            general |= lost
            expanded += [name for name, _ in paths if frontier.expanding]
            known = len(op.outputs) == 1 and op.inputs[place].shape.is_fully_defined()
            if op.type == "ResourceGather" or known:
                sites += [Site(name, len(taps), op, place, steps) for name, steps in paths]
            else:
                general |= dict.fromkeys((name for name, _ in paths), op.type)
        taps.append(op.outputs[0])
    return replace(plain, taps=tuple(taps), sites=tuple(sites), general=general, expanded=tuple(sorted(expanded)))


def _comparable(factor: Any) -> Any:
    """In float32 or better."""
    if tf.is_tensor(factor) and factor.dtype.is_floating:
        return tf.cast(factor, wide([factor]))
    return factor


def _combine(uses: list[Use]) -> bool:
    """Whether the uses of one parameter are of the same numbers, in kinds that can be added, or of different ones."""
    frames: dict[tuple, list[Use]] = {}
    for use in uses:
        frames.setdefault(use.frame, []).append(use)
    names = list(frames)
    if not all(_disjoint(a, b) for i, a in enumerate(names) for b in names[:i]):
        return False
    kinds = [{use.kind for use in same} for same in frames.values() if len(same) > 1]
    return all(kind <= {"outer", "rows"} or kind == {"dense"} for kind in kinds)


def _disjoint(a: tuple, b: tuple) -> bool:
    """Whether two frames are of different parts of a parameter."""
    for one, other in zip(a, b, strict=False):
        if one == other:
            continue
        if one[0] == other[0] == "slice":
            return any(
                stop <= start or end <= begin
                for (begin, stop, s), (start, end, t) in zip(one[1], other[1], strict=True)
                if s == t == 1
            )
        return False
    return False


def _square_norm(uses: list[Use], samples: int) -> tf.Tensor:
    """||sum of the uses||^2 for each sample, (N,)."""
    frames: dict[tuple, list[Use]] = {}
    for use in uses:
        frames.setdefault(use.frame, []).append(use)
    total = None
    for same in frames.values():
        value = tf.reduce_sum(tf.reshape(_of_frame(same), (samples, -1)), 1)
        total = value if total is None else total + value
    return total


def _of_frame(uses: list[Use]) -> tf.Tensor:
    """(N,), or (N * blocks,) where each sample uses several matrices."""
    kind = uses[0].kind
    if kind == "convolution":
        return convolution(*uses[0].factors)
    if kind == "dense":
        return norms.dense(xp, tf.add_n([use.factors[0] for use in uses]))
    outer = [use.factors for use in uses if use.kind == "outer"]
    rows = [use.factors for use in uses if use.kind == "rows"]
    left, right = (_joined(part) for part in zip(*outer, strict=True)) if outer else (None, None)
    index, values = (_joined(part) for part in zip(*rows, strict=True)) if rows else (None, None)
    if not rows:
        return norms.outer(xp, left, right)
    total = norms.rows(xp, index, values)
    if outer:
        total = total + norms.outer(xp, left, right) + 2 * norms.rows_and_outer(xp, index, values, left, right)
    return total


def _joined(arrays: Iterable[tf.Tensor]) -> tf.Tensor:
    arrays = list(arrays)
    dtype = tf.int64 if arrays[0].dtype.is_integer else wide(arrays)
    return arrays[0] if len(arrays) == 1 else tf.concat([tf.cast(array, dtype) for array in arrays], 1)
