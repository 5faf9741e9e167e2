"""Parts of a graph that are known when it is traced, and copies of parts of it."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

MOST_TURNS = 2**12
"""Turns of a loop that are counted one by one."""


class Unknown(Exception):
    """A value is not known before the graph runs."""


def constant(tensor: tf.Tensor) -> np.ndarray | None:
    """The value of a tensor that follows from constants alone, or None."""
    known = tf.get_static_value(tensor)
    if known is not None:
        return known
    try:
        return _evaluated([tensor], [])().pop()
    except Unknown:
        return None


def number_of_turns(op: Any, given: Sequence[tf.Tensor]) -> int | None:
    """How many turns a loop has, where its condition follows from constants; by going through it.

    `op` is the loop, and `given` what goes into it.
    """
    condition, body = op._cond_graph, op._body_graph
    needed = _inputs([condition.outputs[0]], condition)
    while True:
        more = needed | _inputs([body.outputs[i] for i in needed if body.outputs[i] is not body.inputs[i]], body)
        if more == needed:
            break
        needed = more
    order = sorted(needed)
    state = [constant(given[i]) for i in order]
    if any(value is None for value in state):
        return None
    try:
        holds = _evaluated([condition.outputs[0]], [condition.inputs[i] for i in order])
        step = _evaluated([body.outputs[i] for i in order], [body.inputs[i] for i in order])
        turns = 0
        while holds(*state)[0] and turns <= MOST_TURNS:
            state, turns = step(*state), turns + 1
    except Unknown:
        return None
    return turns if turns <= MOST_TURNS else None


def placed(operations: Sequence[tf.Operation], replaced: Mapping[str, tf.Tensor]) -> list[tf.Operation]:
    """Copies of operations of another graph in the current one, with other tensors where `replaced` has some."""
    if not operations:
        return []
    nodes = _nodes([tensor.op for op in operations for tensor in op.inputs if tensor.name not in replaced], replaced)
    nodes |= {op.name: op for op in operations}
    used = {x.name for op in nodes.values() for x in op.inputs}
    mapped = {name: tensor for name, tensor in replaced.items() if name in used}
    names = [op.name for op in operations]
    return tf.graph_util.import_graph_def(_definition(nodes), mapped, names, name="turns")


def _inputs(tensors: Sequence[tf.Tensor], graph: Any) -> set[int]:
    """Which inputs of a graph some of its tensors depend on."""
    names = [x.name for x in graph.inputs]
    nodes = _nodes([tensor.op for tensor in tensors], {})
    return {number for number, name in enumerate(names) if name.partition(":")[0] in nodes}


def _nodes(start: list[tf.Operation], replaced: Container[str]) -> dict[str, tf.Operation]:
    """The operations that others depend on, with those, up to tensors that are replaced."""
    found: dict[str, tf.Operation] = {}
    while start:
        op = start.pop()
        if op.name not in found:
            found[op.name] = op
            start += [tensor.op for tensor in op.inputs if tensor.name not in replaced]
    return found


def _definition(nodes: Mapping[str, tf.Operation]) -> Any:
    """The operations as a graph of their own, without what they wait for."""
    definition = tf.compat.v1.GraphDef()
    for op in nodes.values():
        node = definition.node.add()
        node.CopyFrom(op.node_def)
        kept = [name for name in node.input if not name.startswith("^")]
        del node.input[:]
        node.input.extend(kept)
    return definition


def _evaluated(tensors: Sequence[tf.Tensor], given: Sequence[tf.Tensor]) -> Callable[..., list]:
    """values of `given` -> values of `tensors`, outside of the graph.

    Raises
    ------
    Unknown
        If they depend on anything else.
    """
    names = {x.name for x in given}
    nodes = _nodes([tensor.op for tensor in tensors if tensor.name not in names], names)
    if any(op.type == "Placeholder" or op.op_def.is_stateful or not _plain(op) for op in nodes.values()):
        raise Unknown
    definition, wanted = _definition(nodes), [tensor.name for tensor in tensors]

    def run(*values: tf.Tensor) -> list[tf.Tensor]:
        mapped = {x.name: value for x, value in zip(given, values, strict=True)}
        inner = [name for name in wanted if name not in mapped]
        used = {x.name for op in nodes.values() for x in op.inputs}
        made = tf.graph_util.import_graph_def(definition, {n: v for n, v in mapped.items() if n in used}, inner)
        found = dict(zip(inner, made, strict=True)) | mapped
        return [tf.identity(found[name]) for name in wanted]

    with tf.init_scope():
        spec = [tf.TensorSpec(x.shape, x.dtype) for x in given]
        function = tf.function(run, autograph=False).get_concrete_function(*spec)
    return lambda *values: [np.asarray(x) for x in _at_once(function, spec, values)]


def _at_once(function: Any, spec: Sequence[tf.TensorSpec], values: Sequence[Any]) -> list[tf.Tensor]:
    with tf.init_scope():
        return function(*(tf.constant(v, s.dtype) for v, s in zip(values, spec, strict=True)))


def _plain(op: tf.Operation) -> bool:
    """Whether an operation computes with numbers and nothing else."""
    return all(tensor.dtype not in (tf.resource, tf.variant) for tensor in (*op.inputs, *op.outputs))
