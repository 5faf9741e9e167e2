"""From a tensor that depends on parameters alone back to the parameters.

A weight reaches the data through reshapes, transpositions, slices, sums and products with other parameters. Each step
takes what is known of the gradient by its output to that by its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from lnp_tensorflow.taps.graph import Walk
from lnp_tensorflow.taps.rules import Unread, Use

Step = Callable[[Use, int], Use]
"""(use of an operation's output, N) -> use of its input."""
PATHS = 64
"""Ways from one tensor back to parameters that are followed."""
SAME = {"Identity", "ReadVariableOp", "Cast", "Snapshot"}
RESHAPED = {"Reshape", "ExpandDims", "Squeeze"}
UNARY = {
    *("Exp", "Expm1", "Log", "Log1p", "Sqrt", "Rsqrt", "Square", "Reciprocal", "Inv", "Tanh", "Sigmoid", "Softplus"),
    *("Softsign", "Relu", "Elu", "Abs", "Sin", "Cos", "Erf"),
}
PARTS = {"Split": 1, "SplitV": 0, "Unpack": 0}
"""Operations that cut into parts, and the input that is cut."""
AXES = {"Split": 0, "SplitV": 2}
"""The input that says along which axis."""


def origins(tensor: tf.Tensor, walk: Walk) -> tuple[list[tuple[str, tuple[Step, ...]]], dict[str, str]]:
    """([(parameter, steps from the tensor to it)], {parameter that cannot be followed: operation})."""
    paths: list[tuple[str, tuple[Step, ...]]] = []
    lost: dict[str, str] = {}

    def follow(tensor: tf.Tensor, steps: tuple[Step, ...]) -> None:
        name = walk.parameters.get(tensor.name)
        if name is not None:
            paths.append((name, steps))
            return
        op, seen = tensor.op, set()
        for place, given in enumerate(op.inputs):
            if given.name not in walk.origins or given.name in seen:
                continue
            seen.add(given.name)
            step = _step(op, place, tensor)
            if step is None or len(paths) > PATHS or [t.name for t in op.inputs].count(given.name) > 1:
                lost.update(dict.fromkeys(walk.origins[given.name], op.type))
            else:
                follow(given, (*steps, step))

    follow(tensor, ())
    return [(name, steps) for name, steps in paths if name not in lost], lost


def _step(op: tf.Operation, place: int, out: tf.Tensor) -> Step | None:
    """The step through an operation, or None where it is not known."""
    if op.type in SAME:
        return lambda use, samples: use
    if op.type == "ResourceGather":
        return _looked_up(op, place)
    if not (out.shape.is_fully_defined() and op.inputs[place].shape.is_fully_defined()):
        return None
    if op.type in UNARY:
        (slope,) = tf.gradients(out, op.inputs[place])
        return lambda use, samples: _scaled(use, slope, op, place, samples)
    if op.type in PARTS:
        return _part(op, place, [t.name for t in op.outputs].index(out.name))
    return STEPS[op.type](op, place) if op.type in STEPS else None


def _framed(*frame: tuple) -> Step:
    return lambda use, samples: Use(use.kind, use.arrays, (*frame, *use.frame))


def _part(op: tf.Operation, place: int, which: int) -> Step | None:
    """One of the parts into which an axis is cut."""
    axis = op.get_attr("axis") if op.type == "Unpack" else tf.get_static_value(op.inputs[AXES[op.type]])
    if place != PARTS[op.type] or axis is None:
        return None
    sizes = list(op.inputs[place].shape)
    widths = [1 if op.type == "Unpack" else out.shape[int(axis)] for out in op.outputs]
    start = sum(widths[:which])
    ranges = [(0, size, 1) for size in sizes]
    ranges[int(axis)] = (start, start + widths[which], 1)
    return _framed(("slice", tuple(ranges)), ("reshape", tuple(op.outputs[which].shape)))


def _reshape(op: tf.Operation, place: int) -> Step | None:
    before, after = tuple(op.inputs[0].shape), tuple(op.outputs[0].shape)
    if place != 0:
        return None

    def step(use: Use, samples: int) -> Use:
        if before == after:
            return use
        if use.kind == "dense" and not use.frame:
            return Use("dense", (tf.reshape(use.arrays[0], (samples, *before)),))
        return Use(use.kind, use.arrays, (("reshape", after), *use.frame))

    return step


def _slice(op: tf.Operation, place: int) -> Step | None:
    ranges = _ranges(op)
    if place != 0 or ranges is None:
        return None
    whole = all(taken == (0, size, 1) for taken, size in zip(ranges, op.inputs[0].shape, strict=True))
    return _reshape(op, place) if whole else _framed(("slice", ranges), ("reshape", tuple(op.outputs[0].shape)))


def _transpose(op: tf.Operation, place: int) -> Step | None:
    given = tf.get_static_value(op.inputs[1])
    if place != 0 or given is None:
        return None
    order = tuple(int(i) for i in given)

    def step(use: Use, samples: int) -> Use:
        if use.kind == "dense" and not use.frame:
            back = [0, *(1 + order.index(i) for i in range(len(order)))]
            return Use("dense", (tf.transpose(use.arrays[0], back),))
        if use.kind == "outer" and not use.frame and order == (1, 0):
            return Use("outer", use.arrays[::-1])
        return Use(use.kind, use.arrays, (("transpose", order), *use.frame))

    return step


def _looked_up(op: tf.Operation, place: int) -> Step | None:
    """Rows of a table that are the same for all samples, such as those of positions."""
    axis = tf.get_static_value(op.inputs[2]) if op.type == "GatherV2" else 0
    if place != 0 or axis is None or int(axis) != 0 or op.get_attr("batch_dims"):
        return None
    index = tf.reshape(op.inputs[1], (1, -1))

    def step(use: Use, samples: int) -> Use:
        if use.kind != "dense" or use.frame:
            raise Unread(op.type)
        rows = tf.broadcast_to(index, (samples, index.shape[1]))
        return Use("rows", (rows, tf.reshape(use.arrays[0], (samples, index.shape[1], -1))))

    return step


def _linear(factor: Callable[[tf.Operation, int], Any]) -> Callable[[tf.Operation, int], Step | None]:
    """A sum, or a product with what is not followed."""

    def of(op: tf.Operation, place: int) -> Step | None:
        slope = factor(op, place)
        return None if slope is None else lambda use, samples: _scaled(use, slope, op, place, samples)

    return of


def _scaled(use: Use, slope: Any, op: tf.Operation, place: int, samples: int) -> Use:
    """The use of an input, where the output's derivative by it is `slope`, element by element."""
    shape = op.inputs[place].shape
    if use.kind == "dense" and not use.frame:
        factor = slope if isinstance(slope, int) else tf.cast(slope, use.arrays[0].dtype)
        return Use("dense", (_unbroadcast(use.arrays[0] * factor, shape, samples),))
    single = isinstance(slope, int) or math.prod(slope.shape) == 1
    if not single or use.kind not in ("outer", "rows") or math.prod(shape) != math.prod(op.outputs[0].shape):
        raise Unread(op.type)
    scaled = 0 if use.kind == "outer" else 1
    factors = list(use.arrays)
    factor = slope if isinstance(slope, int) else tf.cast(tf.reshape(slope, ()), factors[scaled].dtype)
    factors[scaled] = factors[scaled] * factor
    return Use(use.kind, tuple(factors), use.frame)


def _unbroadcast(gradient: tf.Tensor, shape: tf.TensorShape, samples: int) -> tf.Tensor:
    """(N, *shape) of (N, ...) for what was broadcast."""
    lead = gradient.shape.rank - 1 - shape.rank
    axes = [*range(1, 1 + lead), *(1 + lead + i for i, size in enumerate(shape) if size == 1)]
    return tf.reshape(tf.reduce_sum(gradient, axes) if axes else gradient, (samples, *shape))


def _product(op: tf.Operation, place: int) -> Step | None:
    """A weight that is the product of two, as in low-rank adapters."""
    if op.get_attr("transpose_a") or op.get_attr("transpose_b"):
        return None
    other = op.inputs[1 - place]

    def step(use: Use, samples: int) -> Use:
        if use.kind != "outer" or use.frame:
            raise Unread(op.type)
        left, right = use.arrays
        beside = tf.cast(other, left.dtype)
        if place == 0:
            return Use("outer", (left, tf.matmul(right, beside, transpose_b=True)))
        return Use("outer", (tf.matmul(left, beside), right))

    return step


def _ranges(op: tf.Operation) -> tuple | None:
    """The range that a slice takes of each axis."""
    given = [tf.get_static_value(tensor) for tensor in op.inputs[1:4]]
    if any(value is None for value in given) or op.get_attr("ellipsis_mask"):
        return None
    masks = [op.get_attr(f"{name}_mask") for name in ("new_axis", "shrink_axis", "begin", "end")]
    sizes = list(op.inputs[0].shape)
    ranges: list[tuple[int, int, int]] = []
    for place, (start, stop, step) in enumerate(zip(*given, strict=True)):
        new, shrink, begin, end = (bool(mask & 1 << place) for mask in masks)
        if new:
            continue
        size = sizes[len(ranges)]
        if shrink:
            ranges.append((int(start) % size, int(start) % size + 1, 1))
        else:
            ranges.append(slice(None if begin else int(start), None if end else int(stop), int(step)).indices(size))
    return (*ranges, *((0, size, 1) for size in sizes[len(ranges) :]))


STEPS: dict[str, Callable[[tf.Operation, int], Step | None]] = {
    **dict.fromkeys(RESHAPED, _reshape),
    "StridedSlice": _slice,
    "Transpose": _transpose,
    "GatherV2": _looked_up,
    "MatMul": _product,
    "Neg": _linear(lambda op, place: -1),
    **dict.fromkeys(("Add", "AddV2"), _linear(lambda op, place: 1)),
    "Sub": _linear(lambda op, place: 1 - 2 * place),
    "Mul": _linear(lambda op, place: op.inputs[1 - place]),
    "RealDiv": _linear(
        lambda op, place: 1 / op.inputs[1] if place == 0 else -op.inputs[0] / op.inputs[1] ** 2,
    ),
}
