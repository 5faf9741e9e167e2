"""Losses in JAX, and the number of terms they average."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lnp.losses import kinds
from lnp_jax.outputs import measured, parts


def prepare(
    loss: str | Callable | None, outputs: Any, targets: Any, given: Any
) -> tuple[Callable, Any, tuple, tuple[str, ...]]:
    """(loss(outputs, targets) -> scalar, loss_terms, violations, notes), where outputs may be of any structure."""
    single = hasattr(outputs, "shape") and hasattr(targets, "shape")
    shape = tuple(outputs.shape) if single else ()
    integer = single and jnp.issubdtype(targets.dtype, jnp.integer)
    meant = kinds.resolve(loss, shape, tuple(targets.shape) if single else None, integer)
    if isinstance(meant, str) and not single:
        kinds.resolve(None, (), None, False)  # a named loss needs single arrays just as much
    if meant in kinds.ELEMENTWISE:
        kinds.check_same_shape(shape, targets.shape)
        return ELEMENTWISE[meant], math.prod(shape) if given is None else given, (), ()
    if meant == "cross_entropy":
        kinds.class_axis(shape, targets.shape, integer)
        if not integer:
            return _soft_cross_entropy, math.prod(shape[:-1]) if given is None else given, (), ()
        terms = kinds.label_terms(jnp, targets) if given is None else given
        return _cross_entropy, terms, (kinds.labels_out_of_range(jnp, targets, shape[-1]),), ()
    assert callable(meant)
    if given is not None:
        return meant, given, (), ()
    stated = kinds.stated_terms(meant, outputs, targets)
    if stated is not None:
        return meant, stated[0], (), stated[1]
    leaf = outputs if hasattr(outputs, "shape") else parts(outputs)[0]
    terms, note = kinds.assumed_terms(jnp, tuple(leaf.shape), targets if single else None, integer)
    return meant, terms, (), (note,)


def value(loss: str | Callable | None, outputs: Any, targets: Any) -> jax.Array:
    """The loss of a batch as it is trained on: a callable of the user's on the outputs as they are, one of lnp's own in
    float32 or better.
    """
    if callable(loss):
        return loss(outputs, targets)
    targets = jax.tree.map(jnp.asarray, targets)
    wide = lambda leaf: leaf.astype(jnp.result_type(jnp.float32, leaf.dtype)) if measured(leaf) else leaf
    outputs = jax.tree.map(wide, outputs)
    return prepare(loss, outputs, targets, None)[0](outputs, targets)


def _mse(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.mean((outputs - targets.astype(outputs.dtype)) ** 2)


def _huber(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    distance = jnp.abs(outputs - targets.astype(outputs.dtype))
    return jnp.mean(jnp.where(distance < 1, 0.5 * distance**2, distance - 0.5))


def _binary_cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.mean(jax.nn.softplus(outputs) - targets.astype(outputs.dtype) * outputs)


ELEMENTWISE = {"mse": _mse, "huber": _huber, "binary_cross_entropy": _binary_cross_entropy}


def _soft_cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return -jnp.mean(jnp.sum(targets.astype(outputs.dtype) * jax.nn.log_softmax(outputs), axis=-1))


def _cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean over labels that are not ignored; labels out of range are taken in, and reported as violations."""
    kept = targets != kinds.IGNORE_INDEX
    labels = jnp.clip(targets, 0, outputs.shape[-1] - 1)[..., None]
    picked = jnp.take_along_axis(jax.nn.log_softmax(outputs), labels, axis=-1)[..., 0]
    return -jnp.sum(jnp.where(kept, picked, 0)) / jnp.sum(kept)
