"""A traced forward pass, walked from its inputs to its outputs: where the data meet the parameters.

Each tensor is one of three kinds: it depends on the samples of the batch; or on parameters alone (a transposed weight,
the inverse of a standard deviation times a scale); or on neither. An operation that makes the first from the second is
a frontier. The cotangents of the frontiers' outputs hold all that single samples do to the parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import tensorflow as tf

UNDIFFERENTIATED = {"StopGradient", "PreventGradient", "ZerosLike", "OnesLike"}
SIZES = {"Shape", "ShapeN", "Size", "Rank"}
EXPANDING = {"BroadcastTo", "Tile", "AddV2", "Add", "Sub", "Mul", "RealDiv"}
"""Operations by which something of one row becomes one row for each sample."""


@dataclass(frozen=True)
class Frontier:
    """An operation with data and parameters among its inputs.

    Attributes
    ----------
    op:
        The operation.
    places:
        Which of its inputs depend on parameters alone.
    expanding:
        Whether it has no data among its inputs, and is taken for where one row becomes one for each sample.
    """

    op: tf.Operation
    places: tuple[int, ...]
    expanding: bool = False


@dataclass(frozen=True)
class Walk:
    """What was found.

    Attributes
    ----------
    frontiers:
        In the order in which they run.
    origins:
        {name of a tensor: the parameters that it depends on} of those that depend on parameters alone.
    data:
        Names of tensors that depend on the samples.
    parameters:
        {name of a tensor, or of a variable's handle: the parameter that it is}.
    """

    frontiers: tuple[Frontier, ...]
    origins: Mapping[str, frozenset[str]]
    data: frozenset[str]
    parameters: Mapping[str, str]


def walk(
    operations: Iterable[tf.Operation],
    parameters: Mapping[str, str],
    data: Iterable[str],
    samples: int,
    known: Collection[str] = (),
) -> Walk:
    """Find the frontiers among the operations of a graph, given the names of the tensors where it starts.

    `known` are operations with data and parameters that are no frontiers: what they do is seen elsewhere.
    """
    seen, frontiers = set(data), []
    origins = {tensor: frozenset([name]) for tensor, name in parameters.items()}
    for op in operations:
        if op.type in SIZES:
            continue
        inputs = [tensor.name for tensor in op.inputs]
        of_data = any(name in seen for name in inputs)
        places = tuple(i for i, name in enumerate(inputs) if name in origins)
        of_data = of_data or op.name in known
        if op.name in known or op.type in UNDIFFERENTIATED or not any(_differentiable(out) for out in op.outputs):
            places = ()
        if places and (of_data or _expands(op, places, samples)):
            frontiers.append(Frontier(op, places, not of_data))
            of_data = True
        if of_data:
            seen |= {out.name for out in op.outputs}
        elif places:
            names = frozenset().union(*(origins[inputs[i]] for i in places))
            origins |= {out.name: names for out in op.outputs if _differentiable(out)}
    return Walk(tuple(frontiers), origins, frozenset(seen), dict(parameters))


def _differentiable(tensor: tf.Tensor) -> bool:
    return tensor.dtype.is_floating or tensor.dtype.is_complex or tensor.dtype in (tf.resource, tf.variant)


def _expands(op: tf.Operation, places: tuple[int, ...], samples: int) -> bool:
    """Whether this is where something that is the same for all samples becomes one row for each."""
    shape = op.outputs[0].shape
    if op.type == "MatMul" and places == (1,):  # of rows that are the same in each batch, such as states to start with
        rows = op.inputs[0].shape
        return bool(shape.rank and rows.rank) and shape[0] == rows[0] == samples
    if op.type not in EXPANDING:
        return False
    if not shape.rank or shape[0] != samples:
        return False
    given = [op.inputs[i].shape for i in places]
    return all(s.rank is not None and (s.rank < shape.rank or s[0] == 1) for s in given)
