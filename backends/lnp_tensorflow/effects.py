"""What operations of a traced function do beside computing: write to variables, draw random numbers, call Python."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import auto_control_deps_utils  # knows of nested functions what they write to

WRITES = re.compile(r"Assign\w*VariableOp|Resource(Scatter|StridedSliceAssign)\w*|Rng\w+|Stateful(?!Partitioned)\w+")
DRAWS = re.compile(
    r"(Parameterized)?TruncatedNormal|Random(Uniform|UniformInt|StandardNormal|Shuffle|Gamma|PoissonV2)|Multinomial"
)
"""Operations with a random state of their own: each one in a graph has another."""
SEEDED = re.compile(r"Stateless(Random(?!Get)|TruncatedNormal|ParameterizedTruncatedNormal|Multinomial|Shuffle)\w*")
"""Operations that draw the same random numbers for the same seed and shape."""
FROM_STATE = re.compile(r"Stateful(?!Partitioned)\w+")
"""Operations that draw from a generator, whose state is a variable."""
HOST = re.compile(r"(Eager)?PyFunc\w*")
DRAWN = (
    "the network draws random numbers (dropout does that), which single samples would not see: they are not taken "
    "apart, so that errors are larger and there are no population values. To measure without them, pass forward= a "
    "function that calls the model with training=False"
)
OVERWRITES = (
    "the network writes to trained variables while it runs (spectral normalisation does): the gradient is taken at "
    "what it then reads, as in a training step, and not through how it came to be"
)
CALLED = (
    "the network calls Python while it runs (tf.py_function or tf.numpy_function), which may be another function at "
    "each call: the samples are not taken apart"
)


def written(graph: Any) -> tuple[tf.Variable, ...]:
    """The variables that a graph uses, if it writes to any."""
    return graph.variables if any(WRITES.fullmatch(node.op) for node in _nodes(graph)) else ()


def overwrites(graph: Any, variables: Iterable[tf.Variable]) -> bool:
    """Whether a graph writes to any of these variables."""
    handles = {id(variable.handle) for variable in variables}
    inner = {id(captured) for outer, captured in graph.captures if id(outer) in handles}
    return any(
        id(tensor) in inner
        for op in graph.get_operations()
        for tensor in auto_control_deps_utils.get_read_write_resource_inputs(op)[1]
    )


def calls_python(graph: Any) -> bool:
    """Whether a graph calls Python while it runs."""
    return any(HOST.fullmatch(node.op) for node in _nodes(graph))


def custom_backward(graph: Any) -> bool:
    """Whether anything in a graph has a backward pass that somebody wrote: a custom gradient leaves an IdentityN."""
    return any(node.op == "IdentityN" or "_gradient_op_type" in node.attr for node in _nodes(graph))


def changing(graph: Any) -> bool:
    """Whether a second call of what was traced may return something else than the first."""
    return any(pattern.fullmatch(node.op) for node in _nodes(graph) for pattern in (WRITES, DRAWS, HOST))


def draws(operations: Iterable[tf.Operation]) -> list[tf.Operation]:
    """The operations that draw random numbers from a state of their own."""
    return [op for op in operations if DRAWS.fullmatch(op.type)]


def varying(graph: Any, draws_in_python: bool) -> str:
    """Why single samples would see another network than the batch does, or nothing.

    Numbers of which there cannot be one for each sample are the same for all, if they come from a seed or from a
    variable, which each pass starts with.
    """
    outputs = graph.structured_outputs
    samples = outputs[0].shape[0] if outputs and outputs[0].shape.rank else None
    names = reaching(graph.get_operations(), outputs)
    used = [op for op in graph.get_operations() if op.name in names]
    inner = [node.op for node in nested(graph.as_graph_def())]
    if any(HOST.fullmatch(kind) for kind in (*(op.type for op in used), *inner)):
        return CALLED
    drawn = any(pattern.fullmatch(kind) for kind in inner for pattern in (DRAWS, SEEDED, FROM_STATE))
    drawn = drawn or any(DRAWS.fullmatch(op.type) for op in used)
    seeded = [op for op in used if SEEDED.fullmatch(op.type) or FROM_STATE.fullmatch(op.type)]
    drawn = drawn or any(_of_samples(op, samples) for op in seeded)
    return DRAWN if drawn or draws_in_python else ""


def _of_samples(op: tf.Operation, samples: int | None) -> bool:
    """Whether an operation may make a number for each sample."""
    shape = op.outputs[0].shape
    return not samples or not shape.is_fully_defined() or math.prod(shape) % samples == 0


def reaching(operations: Iterable[tf.Operation], outputs: list[tf.Tensor]) -> set[str]:
    """Names of the operations that the outputs depend on."""
    found = {out.op.name for out in outputs}
    for op in reversed(list(operations)):
        if op.name in found:
            found |= {tensor.op.name for tensor in op.inputs}
    return found


def replayed(graph: Any, replaced: Mapping[str, tf.Tensor], drawn: list[tf.Operation], whose: str) -> list[tf.Tensor]:
    """The outputs of a traced function in the current graph, with the random numbers that `drawn` have drawn.

    Parameters
    ----------
    replaced:
        {name of a placeholder of the graph: the tensor in its place}.
    whose:
        For the error: "the network" or "the loss".

    Raises
    ------
    ValueError
        If it cannot be repeated.
    """
    definition, again = graph.as_graph_def(), draws(graph.get_operations())
    if any(DRAWS.fullmatch(node.op) for node in nested(definition)) or len(drawn) != len(again):
        raise ValueError(
            f"{whose} draws random numbers inside a nested tf.function or a loop, so that it cannot be evaluated a "
            "second time with the same ones. Expected the same function at every call. Switch dropout off, or call "
            "the inner function directly (.python_function)."
        )
    if calls_python(graph):
        raise ValueError(
            f"{whose} calls Python while it runs (tf.py_function or tf.numpy_function), so that it cannot be known to "
            "be the same function a second time. Expected TensorFlow's operations."
        )
    made = dict(replaced)
    for mine, other in zip(drawn, again, strict=True):
        made |= dict(zip((t.name for t in other.outputs), mine.outputs, strict=True))
    outputs = [tensor.name for tensor in graph.structured_outputs]
    capture = tf.compat.v1.get_default_graph().capture
    captured = {name: capture(tensor) for name, tensor in made.items()}
    return tf.graph_util.import_graph_def(definition, captured, outputs, name="again")


def nested(definition: Any) -> Iterator[Any]:
    """The operations inside functions and loops."""
    return (node for function in definition.library.function for node in function.node_def)


def _nodes(graph: Any) -> list[Any]:
    definition = graph.as_graph_def()
    return [*definition.node, *nested(definition)]
