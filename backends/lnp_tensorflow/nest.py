"""Results as structures that `tf.function` can return."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import tensorflow as tf

import lnp
from lnp.results.gradients import LossGradient


def register() -> None:
    """Make lnp's results known to `tf.nest`, by the protocol that it has for other people's classes, and its functions
    to AutoGraph as ones that need no conversion.
    """
    for result in (lnp.Decomposition, lnp.Layer, lnp.Population, lnp.CrossResponse, LossGradient):
        setattr(result, "__tf_flatten__", _flatten)  # noqa: B010 - the classes do not declare it
        setattr(result, "__tf_unflatten__", classmethod(_unflatten))  # noqa: B010
    for name in lnp.__all__:
        if inspect.isfunction(getattr(lnp, name)):
            setattr(getattr(lnp, name), "autograph_info__", {})  # noqa: B010


def _flatten(self: Any) -> tuple[tuple, tuple]:
    """(what is known when a function is traced, tensors and structures of tensors)."""
    values = {field.name: getattr(self, field.name) for field in fields(self)}
    arrays = {name: value for name, value in values.items() if _holds_tensors(value)}
    known = tuple((name, value) for name, value in values.items() if name not in arrays)
    return (tuple(arrays), known), tuple(arrays.values())


def _unflatten(cls: type, metadata: tuple, components: tuple) -> Any:
    names, known = metadata
    return cls(**dict(zip(names, components, strict=True)), **dict(known))


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, tf.Tensor) or hasattr(leaf, "__tf_flatten__") for leaf in tf.nest.flatten(value))
