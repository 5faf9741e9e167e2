"""Gradients of single samples, or of groups of them, one at a time: nothing of size samples x parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from lnp.contract.trees import leaves, map_leaves
from lnp_tensorflow.outputs import flatten, parts, split, wide
from lnp_tensorflow.replay import Forward

Gradients = dict[str, Any]
"""{name: tensor or IndexedSlices}."""
Norms = dict[str, tf.Tensor]
"""{name: (N,) numbers of single samples}."""
FATAL = (tf.errors.OperatorNotAllowedInGraphError, tf.errors.ResourceExhaustedError, MemoryError)
"""Errors that say nothing about samples: AutoGraph is needed, or there is not enough memory."""


@dataclass(frozen=True)
class Groups:
    """A batch in groups of `size` samples, the last of which may be smaller.

    Attributes
    ----------
    forward:
        The model.
    inputs:
        Of the whole batch.
    shape, dtype:
        (N, K) and the dtype of the flattened outputs.
    size:
        Samples per group.
    wanted:
        The parameters whose gradients are wanted, or None for all.
    """

    forward: Forward
    inputs: Any
    shape: tuple[int, int]
    dtype: tf.DType
    size: int = 1
    wanted: tuple[str, ...] | None = None

    @property
    def names(self) -> list[str]:
        """Of the parameters whose gradients are wanted."""
        return list(self.forward.sources if self.wanted is None else self.wanted)

    @property
    def samples(self) -> int:
        """N."""
        return self.shape[0]

    @property
    def count(self) -> int:
        """G."""
        return -(-self.samples // self.size)

    @property
    def possible(self) -> bool:
        """Whether any input runs over the samples."""
        return any(has_samples(leaf, self.samples) for leaf in leaves(self.inputs))

    def outputs(self) -> tf.Tensor:
        """f, shape (N, K), with the activations of one group in memory at a time."""

        def visit(inputs: Any, _: Any) -> tuple[list, list]:
            return [flatten(parts(self.forward(inputs)))], []

        return self._visit(visit, None, [(self.shape[1], self.dtype)])[0][0]

    def square_norms(self, v: tf.Tensor) -> Norms:
        """{name: (G,) array of ||J_g^T v_g||^2}."""
        return self.numbers(v, lambda name, gradient: square_norm(gradient))[1]

    def numbers(self, v: tf.Tensor, of: Callable[[str, Any], tf.Tensor]) -> tuple[tf.Tensor, Norms]:
        """The outputs (N, K), and {name: (G,) array of numbers of(name, J_g^T v_g)}."""

        def visit(inputs: Any, v: tf.Tensor) -> tuple[list, list]:
            flat, grads = pulled(self.forward, inputs, v, self.names)
            return [flat, self._row(grads, of)], []

        (flat, norms), _ = self._visit(visit, v, [(self.shape[1], self.dtype), (-1, self.dtype)])
        return flat, self._by_name(norms)

    def vjp(self, v: tf.Tensor) -> Gradients:
        """J^T v as the sum over groups."""
        return self.alone(v)[1]

    def alone(self, v: tf.Tensor) -> tuple[tf.Tensor, Gradients, Norms]:
        """Outputs, J^T v and {name: (G,) array of ||J_g^T v_g||^2}, by one pass over the groups."""

        def visit(inputs: Any, v: tf.Tensor) -> tuple[list, list]:
            flat, grads = pulled(self.forward, inputs, v, self.names)
            return [flat, self._row(grads, lambda name, gradient: square_norm(gradient))], [
                tf.convert_to_tensor(grad) for grad in grads.values()
            ]

        (flat, norms), sums = self._visit(visit, v, [(self.shape[1], self.dtype), (-1, self.dtype)])
        return flat, dict(zip(self.names, sums, strict=True)), self._by_name(norms)

    def each(self, norms: Callable[[Any, tf.Tensor], Norms], v: tf.Tensor) -> Norms:
        """{name: (N,)} of what `norms(inputs of a group, its rows of v)` returns for its samples."""
        names = self.names

        def visit(inputs: Any, v: tf.Tensor) -> tuple[list, list]:
            found = norms(inputs, v)
            return [tf.stack([tf.cast(found[name], self.dtype) for name in names], 1)], []

        return self._by_name(self._visit(visit, v, [(len(names), self.dtype)])[0][0])

    def _row(self, grads: Gradients, of: Callable[[str, Any], tf.Tensor]) -> tf.Tensor:
        """Numbers of(name, gradient), shape (1, number of parameters)."""
        return tf.stack([tf.cast(of(name, gradient), self.dtype) for name, gradient in grads.items()])[None]

    def _by_name(self, norms: tf.Tensor) -> Norms:
        return dict(zip(self.names, tf.unstack(norms, axis=1), strict=True))

    def _visit(
        self, visit: Callable[[Any, Any], tuple[list, list]], v: tf.Tensor | None, kept: list[tuple[int, tf.DType]]
    ) -> tuple[list, list]:
        """What `visit(inputs of a group, its rows of v)` returns, over all groups: ([arrays to join], [to add up]).

        `kept` has the width and dtype of what is joined: one row for each sample, or where the width is -1 one row for
        each group, as wide as there are parameters.
        """
        whole = self.samples // self.size
        sources = self.forward.sources
        sums = [tf.zeros(sources[name].shape, sources[name].dtype) for name in self.names]

        def at(start: Any, size: int) -> tuple[list, list]:
            return visit(self._rows(self.inputs, start, size), None if v is None else _cut(v, start, size))

        joined, sums = self._loop(lambda group: at(group * self.size, self.size), whole, kept, sums)
        if whole * self.size == self.samples:
            return joined, sums
        rest, more = at(whole * self.size, self.samples - whole * self.size)
        joined = [tf.concat(pair, 0) for pair in zip(joined, rest, strict=True)] if joined else rest
        return joined, [a + b for a, b in zip(sums, more, strict=False)]

    def _loop(self, at: Callable[[Any], tuple[list, list]], count: int, kept: list, sums: list) -> tuple[list, list]:
        if not count:
            return [], sums
        shapes = [(1, len(sums)) if width < 0 else (self.size, width) for width, _ in kept]
        stores = [tf.TensorArray(d, count, element_shape=s) for (_, d), s in zip(kept, shapes, strict=True)]

        def body(group: Any, stores: list, sums: list) -> tuple:
            rows, added = at(group)
            stores = [store.write(group, row) for store, row in zip(stores, rows, strict=True)]
            return group + 1, stores, [a + b for a, b in zip(sums, added, strict=True)] if added else sums

        state = (tf.constant(0), stores, sums)
        _, stores, sums = tf.while_loop(lambda group, *_: group < count, body, state, parallel_iterations=1)
        full = [(count * rows, *rest) for rows, *rest in shapes]
        return [tf.ensure_shape(store.concat(), shape) for store, shape in zip(stores, full, strict=True)], sums

    def _rows(self, inputs: Any, start: Any, size: int) -> Any:
        return map_leaves(lambda leaf: _cut(leaf, start, size) if has_samples(leaf, self.samples) else leaf, inputs)


def pulled(forward: Forward, inputs: Any, v: tf.Tensor, names: list[str]) -> tuple[tf.Tensor, Gradients]:
    """The outputs (C, K) of some samples and J^T v for the named parameters, by a pass of their own."""
    sources = forward.sources
    if forward.structure.kind == "function":
        sources = {name: tf.identity(tensor) for name, tensor in sources.items()}
    wanted = {name: sources[name] for name in names}
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(list(wanted.values()))
        outputs = parts(forward(inputs, sources))
    return flatten(outputs), gradients(tape, outputs, wanted, v)


def gradients(tape: tf.GradientTape, outputs: list[tf.Tensor], sources: dict[str, Any], v: tf.Tensor) -> Gradients:
    """J^T v from a recorded pass, zero for what was not used."""
    found = tape.gradient(outputs, list(sources.values()), split(v, outputs), tf.UnconnectedGradients.ZERO)
    return dict(zip(sources, found, strict=True))


def dot(a: Any, b: Any) -> tf.Tensor:
    """<a, b> in float32 or better, shape ()."""
    dtype = wide([a, b])
    return tf.reduce_sum(tf.cast(tf.convert_to_tensor(a), dtype) * tf.cast(b, dtype))


def square_norm(gradient: Any) -> tf.Tensor:
    """||gradient||^2 in float32 or better, shape ().

    Rows of an embedding that were used more than once are added before they are squared.
    """
    if not isinstance(gradient, tf.IndexedSlices):
        return tf.reduce_sum(_wide(gradient) ** 2)
    rows = tf.reshape(gradient.indices, (-1,))
    values = tf.reshape(_wide(gradient.values), (tf.size(rows), -1))
    same = tf.cast(rows[:, None] == rows[None, :], values.dtype)  # XLA knows no `unique`: its size varies
    return tf.reduce_sum(same * tf.matmul(values, values, transpose_b=True))


def cut(inputs: Any, index: Any, samples: int) -> Any:
    """The inputs of some samples."""
    return map_leaves(lambda leaf: tf.gather(leaf, index) if has_samples(leaf, samples) else leaf, inputs)


def has_samples(leaf: Any, samples: int) -> bool:
    """Whether an input runs over the samples along its first axis."""
    return tf.is_tensor(leaf) and isinstance(leaf, tf.Tensor) and leaf.shape.rank > 0 and leaf.shape[0] == samples


def _cut(tensor: tf.Tensor, start: Any, size: int) -> tf.Tensor:
    """Rows from `start` on, whose number is known when it is traced."""
    rest = [0] * (tensor.shape.rank - 1)
    return tf.ensure_shape(tf.slice(tensor, [start, *rest], [size, *(-1 for _ in rest)]), (size, *tensor.shape[1:]))


def _wide(tensor: tf.Tensor) -> tf.Tensor:
    return tf.cast(tensor, wide([tensor]))
