"""From what a model returns to the (N, K) arrays that the core sees, and back."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from lnp.contract.trees import leaves, map_leaves
from lnp.contract.validation import check_outputs


def parts(tree: Any) -> list[tf.Tensor]:
    """The floating-point leaves.

    Raises
    ------
    ValueError
        For complex numbers and ragged or sparse tensors, which are not measured, and would be missing without a word.
    """
    found = leaves(tree)
    if any(isinstance(leaf, tf.RaggedTensor | tf.SparseTensor) and leaf.dtype.is_floating for leaf in found):
        raise ValueError(
            "The model returned a ragged or sparse tensor. Expected dense outputs, with as many numbers for each "
            "sample. Pass forward=, a function (model, inputs) -> outputs that pads it, such as by .to_tensor()."
        )
    if any(isinstance(leaf, tf.Tensor) and leaf.dtype.is_complex for leaf in found):
        raise ValueError(
            "The model returned complex numbers. Expected real ones. Pass forward=, a function (model, inputs) -> "
            "outputs that returns real and imaginary parts, such as tf.stack([tf.math.real(z), tf.math.imag(z)], -1)."
        )
    return [leaf for leaf in found if measured(leaf)]


def flatten(tensors: list[tf.Tensor]) -> tf.Tensor:
    """Join (N, ...) tensors to (N, K), in float32 or better."""
    shapes = [tensor.shape for tensor in tensors]
    if any(not shape.is_fully_defined() for shape in shapes):
        raise ValueError(
            f"The outputs have shapes {', '.join(map(str, shapes))}, which are not known when the model is traced. "
            "Expected sizes that follow from those of the inputs. Pad what varies."
        )
    samples = check_outputs([tuple(shape) for shape in shapes])
    dtype = wide(tensors)
    return tf.concat([tf.cast(tf.reshape(tensor, (samples, -1)), dtype) for tensor in tensors], axis=1)


def split(v: tf.Tensor, tensors: list[tf.Tensor]) -> list[tf.Tensor]:
    """The inverse of `flatten`: (N, K) to tensors of the parts' shapes and dtypes."""
    pieces = tf.split(v, [math.prod(tensor.shape[1:]) for tensor in tensors], axis=1)
    return [
        tf.cast(tf.reshape(piece, tensor.shape), tensor.dtype) for piece, tensor in zip(pieces, tensors, strict=True)
    ]


def rebuild(tree: Any, made: list[tf.Tensor]) -> Any:
    """The structure with other floating-point leaves."""
    values = iter(made)
    return map_leaves(lambda leaf: next(values) if measured(leaf) else leaf, tree)


def wide(tensors: list[tf.Tensor]) -> tf.DType:
    """float64 if one of the tensors is, float32 otherwise."""
    return tf.float64 if any(tensor.dtype == tf.float64 for tensor in tensors) else tf.float32


def measured(leaf: Any) -> bool:
    """Whether a leaf of the outputs is taken part in."""
    return tf.is_tensor(leaf) and not isinstance(leaf, tf.RaggedTensor | tf.SparseTensor) and leaf.dtype.is_floating
