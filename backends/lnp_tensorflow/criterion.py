"""A loss whose every evaluation is the same function: it starts with the same state, and draws the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from lnp.state.fingerprint import random_states
from lnp_tensorflow.effects import changing, replayed, written
from lnp_tensorflow.replay import draws_since, operations
from lnp_tensorflow.state_guard import FOREIGN, opened, refusing_variables, undisturbed


@dataclass
class Criterion:
    """The user's loss of the outputs' floating-point parts.

    Attributes
    ----------
    function:
        parts -> scalar.
    loss:
        What the user passed, which a call may write to.
    graph:
        The loss as traced, or None for one of lnp's own, which does nothing but compute.
    draws_in_python:
        Whether it draws random numbers while it is traced.
    """

    function: Callable[[list[tf.Tensor]], tf.Tensor]
    loss: Any
    graph: Any = None
    draws_in_python: bool = False
    _before: list[tuple[tf.Variable, tf.Tensor]] = field(default_factory=list)
    _drawn: list[tf.Operation] = field(default_factory=list)

    @property
    def changes(self) -> bool:
        """Whether another call may return something else: the loss draws, calls Python or keeps a state."""
        return self.draws_in_python or (self.graph is not None and changing(self.graph))

    def __call__(self, parts: list[tf.Tensor]) -> tf.Tensor:
        """The first evaluation, which may be differentiated."""
        before = operations()
        try:
            with undisturbed(self.loss):
                return self.function(parts)
        finally:
            self._drawn = draws_since(before)
            self._restore()

    def again(self, parts: list[tf.Tensor]) -> tf.Tensor:
        """The value at other outputs, with the random numbers of the first evaluation."""
        if not self.changes:
            return self(parts)
        captures = self.graph.captures
        inner = [tensor for tensor in self.graph.inputs if all(tensor is not given for _, given in captures)]
        replaced = dict(zip((tensor.name for tensor in inner), parts, strict=True))
        replaced |= {given.name: outer for outer, given in captures}
        try:
            (value,) = replayed(self.graph, replaced, self._drawn, "the loss")
        finally:
            self._restore()
        return value

    def _restore(self) -> None:
        for variable, value in self._before:
            variable.assign(value)


def criterion(function: Callable[[list[tf.Tensor]], tf.Tensor], loss: Any, parts: list[tf.Tensor]) -> Criterion:
    """A loss on outputs like these parts. One of the user's own is traced once, to see what it writes to and draws."""
    if loss is None or isinstance(loss, str):
        return Criterion(function, loss)

    def run(*parts: tf.Tensor) -> list[tf.Tensor]:
        with refusing_variables():
            return [function(list(parts))]

    roots = opened([loss])
    with undisturbed(*roots):
        before = random_states(roots, FOREIGN)
        spec = [tf.TensorSpec(part.shape, part.dtype) for part in parts]
        graph = tf.function(run, autograph=False).get_concrete_function(*spec).graph
        draws_in_python = random_states(roots, FOREIGN) != before
    return Criterion(function, loss, graph, draws_in_python, [(v, v.read_value()) for v in written(graph)])
