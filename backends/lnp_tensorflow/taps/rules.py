"""Operations whose per-sample gradients follow from their data and the cotangent of their output.

A rule says, for one input of an operation that depends on parameters alone, how to form

    outer        sum_s left[n, s] right[n, s]^T      weights of linear maps
    rows         sum_s e_index[n, s] values[n, s]^T  embeddings
    dense        the gradient itself (N, ...)        biases and scales, which are small
    convolution  a kernel's

from the cotangent d of the output. What is not here is left to the fallback.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from lnp.per_sample.norms import Window
from lnp.per_sample.uses import Factors
from lnp_tensorflow.outputs import wide


class Unread(Exception):
    """What an operation does to a parameter, or where its samples are, is not known."""


@dataclass(frozen=True)
class Use(Factors):
    """What an operation makes of one input: the factors of its gradient, with left and right of an outer product over
    the rows and columns of the frame.

    Attributes
    ----------
    frame:
        Which numbers of the input, in which order: uses of the same frame add.
    """

    frame: tuple = ()


def used(op: tf.Operation, place: int, d: tf.Tensor, samples: int) -> Use:
    """The use that an operation makes of its input number `place`.

    Raises
    ------
    Unread
        If no rule is written for it.
    """
    rule = RULES.get(op.type)
    if rule is None:
        raise Unread(op.type)
    if any(tensor.dtype.is_complex for tensor in [*op.inputs, d]) or not d.shape.is_fully_defined():
        raise Unread(op.type)
    return rule(op, place, _wide(d), samples)


def _wide(array: tf.Tensor) -> tf.Tensor:
    return tf.cast(array, wide([array]))


def first(array: tf.Tensor, samples: int) -> tf.Tensor:
    """(N, S, ...) of an array (N * S, ...) with the samples first; (N, 1, ...) where each has one row.

    Raises
    ------
    Unread
        If the first axis does not run over the samples.
    """
    rows = array.shape[0] if array.shape.rank else 0
    if not rows or rows % samples:
        raise Unread("the samples are not along the first axis")
    return tf.reshape(array, (samples, rows // samples, *array.shape[1:]))


def reduced(gradient: tf.Tensor, shape: tf.TensorShape, samples: int) -> tf.Tensor:
    """Summed over the axes along which an input of this shape was broadcast, but the samples: (N, *shape)."""
    sizes = tuple(shape)
    if len(sizes) == gradient.shape.rank:
        if sizes[0] != 1:
            raise Unread("the samples are not along the first axis")
        sizes = sizes[1:]
    lead = gradient.shape.rank - len(sizes)
    if lead < 1:
        raise Unread("the samples are not along the first axis")
    split = first(gradient, samples)
    axes = [*range(1, 1 + lead), *(1 + lead + i for i, size in enumerate(sizes) if size == 1)]
    return tf.reshape(tf.reduce_sum(split, axes), (samples, *shape))


def _matmul(op: tf.Operation, place: int, d: tf.Tensor, samples: int) -> Use:
    a, b = op.inputs[:2]
    flags = ("transpose_a", "transpose_b") if op.type == "MatMul" else ("adj_x", "adj_y")
    turned = [op.get_attr(flag) for flag in flags]
    ranks = a.shape.rank, b.shape.rank
    lead = "abcdefgh"[: max(ranks) - 2]
    if ranks[0] != ranks[1] and ranks[1 - place] < ranks[place]:
        raise Unread(op.type)
    if a.shape.rank == b.shape.rank and a.shape[:-2] != b.shape[:-2]:
        raise Unread(op.type)
    leads = [lead[len(lead) - (rank - 2) :] for rank in ranks]
    labels = leads[0] + ("ki" if turned[0] else "ik"), leads[1] + ("jk" if turned[1] else "kj")
    return _contraction(op.inputs[1 - place], labels[1 - place], labels[place], d, lead + "ij", samples)


def _einsum(op: tf.Operation, place: int, d: tf.Tensor, samples: int) -> Use:
    given, out = op.get_attr("equation").decode().replace(" ", "").split("->")
    labels = given.split(",")
    if len(labels) != 2 or "." in labels[place]:
        raise Unread(op.type)
    if "." in labels[1 - place]:
        unused = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in given]
        extra = op.inputs[1 - place].shape.rank - (len(labels[1 - place]) - 3)
        labels[1 - place], out = (text.replace("...", "".join(unused[:extra])) for text in (labels[1 - place], out))
    return _contraction(op.inputs[1 - place], labels[1 - place], labels[place], d, out, samples)


def _contraction(x: tf.Tensor, of_x: str, of_p: str, d: tf.Tensor, of_d: str, samples: int) -> Use:
    """A use of a parameter with axes `of_p` in sum over common axes, where those of data and output have labels too."""
    shared = [c for c in of_p if c in of_x and c in of_d]  # one matrix for each, of a sample's own
    inner, made = [c for c in of_p if c in of_x and c not in of_d], [c for c in of_p if c in of_d and c not in of_x]
    positions = [c for c in of_x if c not in of_p]
    plain = all(len(set(labels)) == len(labels) for labels in (of_x, of_p, of_d))
    if not plain or len(shared) + len(inner) + len(made) != len(of_p) or not positions:
        raise Unread("Einsum")
    if set(positions) != {c for c in of_d if c not in of_p} or of_x[0] != positions[0] or of_d[0] != positions[0]:
        raise Unread("the samples are not along the first axis")
    left = _arranged(x, of_x, [positions[0], *shared, *positions[1:]], inner, samples, len(shared))
    right = _arranged(d, of_d, [positions[0], *shared, *positions[1:]], made, samples, len(shared))
    rows, columns = inner, made
    if next((c for c in of_p if c not in shared), None) in made:
        rows, columns, left, right = made, inner, right, left
    order = tuple(of_p.index(c) for c in [*shared, *rows, *columns])
    if not shared and len(rows) == len(columns) == 1:
        return Use("outer", (left, right))
    return Use("outer", (left, right), (("matrix", order, len(shared), len(rows)),))


def _arranged(array: tf.Tensor, labels: str, outer: list, last: list, samples: int, shared: int) -> tf.Tensor:
    """(N * shared, S, features)."""
    order = [labels.index(c) for c in [*outer, *last]]
    if order != sorted(order):
        array = tf.transpose(array, order)
    array = first(array, samples)  # (N, S', shared, S, features)
    if shared and array.shape[1] != 1:
        array = tf.transpose(array, [0, *range(2, 2 + shared), 1, *range(2 + shared, array.shape.rank)])
    elif shared:
        array = tf.reshape(array, (samples, *array.shape[2 : 2 + shared], 1, *array.shape[2 + shared :]))
    features = math.prod(array.shape[array.shape.rank - len(last) :])
    return tf.reshape(array, (samples * math.prod(array.shape[1 : 1 + shared]), -1, features))


def _gather(op: tf.Operation, place: int, d: tf.Tensor, samples: int) -> Use:
    axis = tf.get_static_value(op.inputs[2]) if op.type == "GatherV2" else 0
    if place != 0 or axis is None or int(axis) != 0 or op.get_attr("batch_dims"):
        raise Unread(op.type)
    index = op.inputs[1]
    indices = tf.reshape(first(index, samples), (samples, -1))
    return Use("rows", (indices, tf.reshape(d, (samples, indices.shape[1], -1))))


def _shift(sign: Callable[[int], int]) -> Callable:
    def rule(op: tf.Operation, place: int, d: tf.Tensor, samples: int) -> Use:
        gradient = reduced(d, op.inputs[place].shape, samples)
        return Use("dense", (gradient if sign(place) > 0 else -gradient,))

    return rule


def _multiply(op: tf.Operation, place: int, d: tf.Tensor, samples: int) -> Use:
    return Use("dense", (reduced(d * _wide(op.inputs[1 - place]), op.inputs[place].shape, samples),))


def _divide(op: tf.Operation, place: int, d: tf.Tensor, samples: int) -> Use:
    a, b = (_wide(tensor) for tensor in op.inputs)
    gradient = d / b if place == 0 else -d * a / b**2
    return Use("dense", (reduced(gradient, op.inputs[place].shape, samples),))


def _bias(op: tf.Operation, place: int, d: tf.Tensor, samples: int) -> Use:
    if place != 1:
        raise Unread(op.type)
    if op.get_attr("data_format") == b"NCHW":
        d = tf.reshape(d, (*d.shape[:2], -1))
        return Use("dense", (tf.reduce_sum(first(d, samples), (1, 3)),))
    return Use("dense", (reduced(d, op.inputs[1].shape, samples),))


def _select(op: tf.Operation, place: int, d: tf.Tensor, samples: int) -> Use:
    if place == 0:
        raise Unread(op.type)
    picked = op.inputs[0] if place == 1 else tf.logical_not(op.inputs[0])
    return Use("dense", (reduced(tf.where(picked, d, tf.zeros_like(d)), op.inputs[place].shape, samples),))


def _expand(op: tf.Operation, place: int, d: tf.Tensor, samples: int) -> Use:
    shape, out = op.inputs[0].shape, d.shape
    if op.type == "Tile" and tuple(shape[1:]) != tuple(out[1:]):
        raise Unread(op.type)
    return Use("dense", (reduced(d, shape, samples),))


def _convolution(op: tf.Operation, place: int, d: tf.Tensor, samples: int) -> Use:
    transposed = "Backprop" in op.type
    data = op.inputs[2 if transposed else 0]
    if place != 1:
        raise Unread(op.type)
    kernel = tuple(op.inputs[1].shape)
    channels_last = op.get_attr("data_format") in (b"NHWC", b"NDHWC")
    axes = slice(1, -1) if channels_last else slice(2, None)
    stride, dilation = tuple(op.get_attr("strides"))[axes], tuple(op.get_attr("dilations"))[axes]
    if not channels_last:
        data, d = _channels_last(data), _channels_last(d)
    wide, narrow = (d, data) if transposed else (data, d)
    groups = kernel[-2] if op.type.startswith("Depthwise") else wide.shape[-1] // kernel[-2]
    window = Window(kernel[:-2], stride, dilation, groups)
    padding = _padding(op, window, tuple(wide.shape)[1:-1], tuple(narrow.shape)[1:-1], axes)
    if any(side != (0, 0) for side in padding):
        wide = tf.pad(wide, [(0, 0), *padding, (0, 0)])
    if "SpaceToBatchND" in (data.op.type, data.op.inputs[0].op.type if data.op.type == "ExpandDims" else ""):
        # how a dilated one is computed
        wide, narrow = (_blocks(array, samples) for array in (wide, narrow))
        window = Window((1, *window.kernel), (1, *stride), (1, *dilation), groups)
    elif wide.shape[0] != samples:  # several images of each sample, such as those of all turns of a loop
        wide, narrow = (first(array, samples) for array in (wide, narrow))
        window = Window((1, *window.kernel), (1, *stride), (1, *dilation), groups)
    if wide.shape[0] != samples or narrow.shape[0] != samples:
        raise Unread("the samples are not along the first axis")
    return Use("convolution", (wide, narrow, window), (("convolution",),))


def _blocks(array: tf.Tensor, samples: int) -> tf.Tensor:
    """(N, blocks, ...) of (blocks * N, ...)."""
    rows = array.shape[0]
    if rows % samples:
        raise Unread("the samples are not along the first axis")
    split = tf.reshape(array, (rows // samples, samples, *array.shape[1:]))
    return tf.transpose(split, [1, 0, *range(2, array.shape.rank + 1)])


def _padding(op: tf.Operation, window: Window, wide: tuple, narrow: tuple, axes: slice) -> list[tuple[int, int]]:
    kind = op.get_attr("padding")
    if kind == b"EXPLICIT":
        flat = op.get_attr("explicit_paddings")
        return list(zip(flat[::2], flat[1::2], strict=True))[axes]
    if kind == b"VALID":
        return [(0, 0) for _ in wide]
    missing = [
        max((places - 1) * stride + dilation * (size - 1) + 1 - there, 0)
        for size, stride, dilation, there, places in zip(
            window.kernel, window.stride, window.dilation, wide, narrow, strict=True
        )
    ]
    return [(total // 2, total - total // 2) for total in missing]


def _channels_last(array: tf.Tensor) -> tf.Tensor:
    return tf.transpose(array, [0, *range(2, array.shape.rank), 1])


RULES: dict[str, Callable[[Any, int, Any, int], Use]] = {
    **dict.fromkeys(("MatMul", "BatchMatMul", "BatchMatMulV2"), _matmul),
    "Einsum": _einsum,
    **dict.fromkeys(("GatherV2", "ResourceGather"), _gather),
    **dict.fromkeys(("Add", "AddV2"), _shift(lambda place: 1)),
    "Sub": _shift(lambda place: 1 - 2 * place),
    "Mul": _multiply,
    "RealDiv": _divide,
    "BiasAdd": _bias,
    "SelectV2": _select,
    **dict.fromkeys(("BroadcastTo", "Tile"), _expand),
    **dict.fromkeys(("Conv2D", "Conv3D", "DepthwiseConv2dNative"), _convolution),
    **dict.fromkeys(("Conv2DBackpropInput", "Conv3DBackpropInputV2"), _convolution),
}
