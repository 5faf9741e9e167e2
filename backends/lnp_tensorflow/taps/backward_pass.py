"""Squared norms of single samples' gradients, from the cotangents where data meet parameters.

Nothing of size samples x parameters, and no pass through the weights: one backward pass to the operations that use
parameters gives what each of them does (`rules`), and `lnp.per_sample.uses` does the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import tensorflow as tf

from lnp.contract.trees import leaves, map_leaves
from lnp.per_sample.uses import by_frame, inner_products, readable, square_norms
from lnp_tensorflow import array_namespace as xp
from lnp_tensorflow import effects
from lnp_tensorflow.fallback import Gradients, Norms, has_samples
from lnp_tensorflow.outputs import parts, split, wide
from lnp_tensorflow.replay import Forward, operations
from lnp_tensorflow.taps.convolution import along_convolution, convolution
from lnp_tensorflow.taps.graph import walk
from lnp_tensorflow.taps.loops import Loops, watched
from lnp_tensorflow.taps.rules import Unread, Use, used
from lnp_tensorflow.taps.views import Step, origins

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
        {parameter without rules: the operation that has none}.
    expanded:
        Parameters whose rows are taken to become one for each sample somewhere, once for each place.
    loops:
        Whether parameters are used in loops, whose turns take about as long for a few samples as for many.
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
    loops: bool = False

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
        """({parameter: what it is used for}, {other parameter: why there are no rules for it})."""
        unread = {**dict.fromkeys(skip, ""), **self.general}
        uses: Uses = {name: [] for name in self.sources}
        for site in self.sites:
            if site.name in unread:
                continue
            try:
                uses[site.name].append(self._use(site, cotangents[site.tap]))
            except Unread as error:
                unread[site.name] = str(error)
        for name, many in uses.items():
            if name not in unread and not readable([u.frame for u in many], [u.kind for u in many], _disjoint):
                unread[name] = "several uses"
        return {name: many for name, many in uses.items() if name not in unread}, unread

    def square_norms(self, uses: Uses, samples: int | None = None) -> Norms:
        """{parameter: (N,) squared norms}, zero for what is not used; of uses of other samples, their number."""
        samples = self.samples if samples is None else samples
        zero = tf.zeros(samples, wide(self.outputs))
        return {name: _square_norm(many, zero) for name, many in uses.items()}

    def inner_products(self, uses: Uses, u: Mapping[str, tf.Tensor], index: tf.Tensor) -> Norms:
        """{parameter: (M,) inner products of the gradients of some samples, index (M,), with u}."""
        zero = tf.zeros(index.shape[0], wide(self.outputs))
        return {
            name: tf.add_n([zero, *(_inner_product(use, u[name], zero) for use in many)])
            for name, many in self.of_samples(uses, index).items()
        }

    def of_samples(self, uses: Uses, index: tf.Tensor) -> Uses:
        """The uses by some of the samples, index (M,)."""

        def rows(array: Any) -> Any:
            if not tf.is_tensor(array):
                return array
            by_sample = tf.gather(tf.reshape(array, (self.samples, -1, *array.shape[1:])), index)
            return tf.reshape(by_sample, (-1, *array.shape[1:]))

        return {
            name: [replace(use, arrays=tuple(map(rows, use.arrays))) for use in many] for name, many in uses.items()
        }

    def _use(self, site: Site, d: Any) -> Use:
        """What the operation of a site makes of the parameter, from the cotangent d of its output."""
        if d is None:
            raise Unread("a gradient of its own")
        d = tf.ensure_shape(d, self.taps[site.tap].shape)  # of what comes out of a loop it may be lost
        use = used(site.op, site.place, d, self.samples)
        for step in site.steps:
            use = step(use, self.samples)
        dtype = wide(self.outputs)  # uses in several could not be added
        floating = [tf.is_tensor(array) and array.dtype.is_floating for array in use.arrays]
        arrays = zip(use.arrays, floating, strict=True)
        return replace(use, arrays=tuple(tf.cast(array, dtype) if is_float else array for array, is_float in arrays))


def recorded(run: Forward, inputs: Any, samples: int | None = None) -> Tapped:
    """Run the model. In a graph, with taps; in its loops, too, where it is known how many samples there are."""
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
        count = run.samples if samples is None else samples
        loops = Loops(tape, graph, before, parameters, _data(inputs, count), count, run.structure.roots)
        with watched(loops):
            returned = run(inputs, sources)
    plain = _plain(returned, sources, tape)
    if not all(isinstance(out, tf.Tensor) and out.shape.is_fully_defined() for out in plain.outputs):
        return plain
    made = graph.get_operations()[before:]
    return _with_taps(plain, made, parameters, _data(inputs, plain.samples), loops)


def _data(inputs: Any, samples: int) -> list[str]:
    return [leaf.name for leaf in leaves(inputs) if has_samples(leaf, samples)]


def _plain(returned: Any, sources: dict[str, Any], tape: tf.GradientTape) -> Tapped:
    outputs = parts(returned)
    samples = outputs[0].shape[0] if outputs and outputs[0].shape.rank else 0
    return Tapped(returned, outputs, sources, tape, samples, general=dict.fromkeys(sources, "not traced"))


def _with_taps(
    plain: Tapped, made: list[tf.Operation], parameters: dict[str, str], data: list[str], loops: Loops
) -> Tapped:  # fmt: skip
    seen = walk(made, parameters, data, plain.samples, loops.loops)
    names = effects.reaching(made, plain.outputs)
    taps: list[tf.Tensor] = []
    sites: list[Site] = []
    general: dict[str, str] = dict(loops.general)
    expanded: list[str] = []
    for out in plain.outputs:
        if out.name not in seen.data:
            general |= dict.fromkeys(seen.origins.get(out.name, ()), "an output without data")
    for frontier in seen.frontiers:
        op = frontier.op
        if op.name not in names and op.name not in loops.taps:
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
        taps.append(loops.taps.get(op.name, op.outputs[0]))
    return replace(
        plain,
        taps=tuple(taps),
        sites=tuple(sites),
        general=general,
        expanded=tuple(sorted(expanded)),
        loops=bool(loops.loops),
    )


def _disjoint(frames: list[Any]) -> bool:
    """Whether no two frames share a number of the parameter."""
    return all(_apart(a, b) for i, a in enumerate(frames) for b in frames[:i])


def _apart(a: tuple, b: tuple) -> bool:
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


def _square_norm(uses: list[Use], zero: tf.Tensor) -> tf.Tensor:
    """||sum of the uses||^2 for each sample, (N,), like `zero`."""
    found = [zero]
    for group in by_frame(use.frame for use in uses).values():
        value = square_norms(xp, [uses[number] for number in group], convolution)  # (N * blocks,) of several matrices
        found.append(tf.reduce_sum(tf.reshape(value, (*zero.shape, -1)), 1))
    return tf.add_n(found)


def _inner_product(use: Use, u: tf.Tensor, zero: tf.Tensor) -> tf.Tensor:
    """<gradient of sample n by one use, u> with u of the parameter's shape. (N,), like `zero`."""
    u = framed(tf.cast(u, zero.dtype), use.frame)
    if use.kind == "convolution":
        x, d, window = use.arrays
        return along_convolution(x, d, window, u)
    if use.kind == "outer" and len(u.shape) == 3:
        left, right = use.arrays
        return _blockwise(left, right, u, zero.shape[0])
    return inner_products(xp, use, u)


def _blockwise(left: tf.Tensor, right: tf.Tensor, u: tf.Tensor, samples: int) -> tf.Tensor:
    """sum_s (left u) . right over several matrices u (blocks, p, q), left (N * blocks, S, p), right (N * blocks, S, q).

    Shape (N,). Not by broadcasting the matrices: TensorFlow 2.21's oneDNN kernel for that corrupts memory.
    """
    blocks = u.shape[0]
    left, right = (
        tf.reshape(
            tf.transpose(tf.reshape(array, (samples, blocks, *array.shape[1:])), (1, 0, 2, 3)),
            (blocks, -1, array.shape[2]),
        )
        for array in (left, right)
    )
    return tf.reduce_sum(tf.reshape(tf.matmul(left, u) * right, (blocks, samples, -1)), (0, 2))


def framed(u: tf.Tensor, frame: tuple) -> tf.Tensor:
    """The numbers of a parameter that a frame shows, in its order: an operation's input, or its matrices."""
    for kind, *what in frame:
        if kind == "reshape":
            u = tf.reshape(u, what[0])
        elif kind == "transpose":
            u = tf.transpose(u, what[0])
        elif kind == "slice":
            u = u[tuple(slice(a, None if step < 0 and b < 0 else b, step) for a, b, step in what[0])]
        elif kind == "matrix":
            order, shared, rows = what
            u = tf.transpose(u, order)
            u = tf.reshape(u, (math.prod(u.shape[:shared]), math.prod(u.shape[shared : shared + rows]), -1))
    return u
