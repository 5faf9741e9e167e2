"""Every forward pass of one measurement as the same function: what it writes to starts anew each time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import control_flow_util  # there is no public way to ask for XLA

from lnp.contract.trees import leaves, map_leaves
from lnp.state.fingerprint import random_states
from lnp_tensorflow import array_namespace
from lnp_tensorflow.effects import OVERWRITES, custom_backward, draws, overwrites, replayed, varying, written
from lnp_tensorflow.model import Arrays, Structure
from lnp_tensorflow.outputs import parts
from lnp_tensorflow.state_guard import FOREIGN, opened, refusing_variables, undisturbed

ANONYMOUS = "cd2c89b7-88b7-44c8-ad83-06c2a9158347"
"""What TensorFlow calls a variable that lives as long as something refers to it."""


@dataclass(frozen=True)
class Forward:
    """A model on one batch.

    Attributes
    ----------
    structure, tree, arrays:
        The model, see `lnp_tensorflow.model`.
    written:
        Variables that a pass writes to, and their values before it.
    narrow:
        The floating-point type of the least precision that the model computes in.
    inline:
        Whether the `tf.function`s that the model calls are traced as if they were its own code, which shows what they
        do with its parameters.
    custom_backward:
        Whether anything in it has a backward pass that somebody wrote by hand.
    varying:
        Why single samples would see another network than the batch does, whatever a comparison of some shows; or
        nothing.
    samples:
        N, the length of the outputs' first axis, or 0 where it has not been seen.
    notes:
        What the user should know of the function that is measured.
    drawing:
        Not empty where random numbers are drawn by Python while the model or its loss is traced: other ones whenever
        they are traced.
    """

    structure: Structure
    tree: Any
    arrays: Arrays
    written: tuple[tuple[tf.Variable, tf.Tensor], ...] = ()
    narrow: tf.DType = tf.float64
    inline: bool = False
    custom_backward: bool = False
    varying: str = ""
    samples: int = 0
    notes: tuple[str, ...] = ()
    drawing: list[str] = field(default_factory=list)

    @property
    def sources(self) -> dict[str, Any]:
        """{name: tensor or variable that is differentiated by}."""
        return self.structure.sources(self.arrays)

    def __call__(self, inputs: Any, sources: dict[str, Any] | None = None) -> Any:
        """The outputs; `sources` replaces tensors, and is left unused for variables."""
        arrays = self.arrays
        if sources is not None and self.structure.kind == "function":
            arrays = arrays | sources
        try:
            with undisturbed(*self.structure.roots), inlined(self.inline and not tf.executing_eagerly()):
                return self.structure.call(self.tree, arrays, inputs)
        finally:
            for variable, value in self.written:
                variable.assign(value)


def forward(structure: Structure, tree: Any, arrays: Arrays, inputs: Any) -> Forward:
    """The model's passes. Traces the model once to see what it writes to and draws."""
    roots = opened(structure.roots)
    with undisturbed(*roots):
        before = random_states(roots, FOREIGN)
        graph, inline = _graph(structure, tree, arrays, inputs)
        draws_in_python = random_states(roots, FOREIGN) != before
    types = {tensor.dtype for op in graph.get_operations() for tensor in op.outputs if tensor.dtype.is_floating}
    narrow = max(types, key=lambda dtype: array_namespace.finfo(dtype).eps, default=tf.float64)
    values = tuple((variable, variable.read_value()) for variable in written(graph))
    why, drawing = varying(graph, draws_in_python), ["the network"] if draws_in_python else []
    outputs = graph.structured_outputs
    samples = (outputs[0].shape[0] or 0) if outputs and outputs[0].shape.rank else 0
    trained = structure.sources(arrays).values() if structure.kind == "variables" else ()
    notes = (OVERWRITES,) if overwrites(graph, trained) else ()
    return Forward(
        structure, tree, arrays, values, narrow, inline, custom_backward(graph), why, samples, notes, drawing
    )  # fmt: skip


def _graph(structure: Structure, tree: Any, arrays: Arrays, inputs: Any) -> tuple[Any, bool]:
    """The traced model, and whether the `tf.function`s in it could be traced as its own code.

    That is tried first: a `tf.function` keeps what has been traced, and would run no Python at its next call.
    """
    if not structure.autograph:
        with contextlib.suppress(tf.errors.OperatorNotAllowedInGraphError):  # it needs AutoGraph
            return traced(structure, tree, arrays, inputs, True).graph, True
    return traced(structure, tree, arrays, inputs).graph, False


@contextlib.contextmanager
def inlined(on: bool) -> Iterator[None]:
    """Where `tf.function`s are traced as if they were plain Python."""
    before = tf.config.functions_run_eagerly()
    try:
        if on:
            tf.config.run_functions_eagerly(True)
        yield
    finally:
        if on:
            tf.config.run_functions_eagerly(before)


def compiled_inside(structure: Structure, tree: Any, arrays: Arrays, inputs: Any) -> bool:
    """Whether the model calls functions that it has compiled by XLA, which `inlined` takes for plain ones."""
    with undisturbed(*structure.roots):
        operations = traced(structure, tree, arrays, inputs).graph.get_operations()
    return any(op.node_def.attr["_XlaMustCompile"].b for op in operations)


def in_xla() -> bool:
    """Whether what is traced will be compiled by XLA."""
    return not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def traced(structure: Structure, tree: Any, arrays: Arrays, inputs: Any, inline: bool = False) -> Any:
    """The concrete function (arrays, leaves of the inputs) -> floating-point leaves of the outputs.

    What that does to the user's Python objects stays.
    """
    given = leaves(inputs)
    tensors = [leaf for leaf in given if tf.is_tensor(leaf)]

    def run(arrays: Arrays, tensors: list) -> list:
        values = iter(tensors)
        filled = map_leaves(lambda leaf: next(values) if tf.is_tensor(leaf) else leaf, inputs)
        with refusing_variables(), inlined(inline):
            return parts(structure.call(tree, arrays, filled))

    spec = tf.nest.map_structure(tf.type_spec_from_value, (arrays, tensors), expand_composites=False)
    return tf.function(run, autograph=False).get_concrete_function(*spec)


def moved(forward: Forward, inputs: Any, sources: dict[str, tf.Tensor], drawn: list[tf.Operation]) -> list[tf.Tensor]:
    """The outputs with other parameters, and with the random numbers that the operations `drawn` have drawn.

    The traced model is placed into the current graph a second time, where variables that are read are others, made for
    the purpose: the user's are not moved.
    """
    structure = forward.structure
    with undisturbed(*structure.roots):
        graph = traced(structure, forward.tree, forward.arrays, inputs, forward.inline).graph
    replaced = _captured(structure, graph, sources) | _arguments(forward, graph, inputs, sources)
    try:
        return replayed(graph, replaced, drawn, "the network")
    finally:
        for variable, value in forward.written:
            variable.assign(value)


def _captured(structure: Structure, graph: Any, sources: dict[str, tf.Tensor]) -> dict[str, Any]:
    """{name of a placeholder: what the graph has captured there}, for trained variables new ones with other values."""
    handles = {}
    if structure.kind == "variables":
        for name, variable in structure.sources({}).items():
            other = tf.raw_ops.VarHandleOp(dtype=variable.dtype, shape=variable.shape, shared_name=ANONYMOUS)
            tf.raw_ops.AssignVariableOp(resource=other, value=sources[name])
            handles[id(variable.handle)] = other
    return {inner.name: handles.get(id(outer), outer) for outer, inner in graph.captures}


def _arguments(forward: Forward, graph: Any, inputs: Any, sources: dict[str, tf.Tensor]) -> dict[str, Any]:
    arrays = forward.arrays | (sources if forward.structure.kind == "function" else {})
    tensors = [leaf for leaf in leaves(inputs) if tf.is_tensor(leaf)]
    given = tf.nest.flatten((arrays, tensors), expand_composites=True)
    inner = [tensor for tensor in graph.inputs if all(tensor is not captured for _, captured in graph.captures)]
    return dict(zip((tensor.name for tensor in inner), given, strict=True))


def draws_since(before: int) -> list[tf.Operation]:
    """Random operations of the current graph after its first `before` operations; none where there is no graph."""
    return draws(made_since(before))


def made_since(before: int) -> list[tf.Operation]:
    """Operations of the current graph after its first `before` operations."""
    return [] if tf.executing_eagerly() else tf.compat.v1.get_default_graph().get_operations()[before:]


def operations() -> int:
    """Of the current graph."""
    return 0 if tf.executing_eagerly() else len(tf.compat.v1.get_default_graph().get_operations())
