"""The types of the arguments that lnp's functions have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

Model = Any
"""A model of a framework that has a backend, or (apply, parameters)."""
Batch = Any
"""(inputs, targets), or a dictionary with labels; of any structure that the model takes."""
LossName = Literal["cross_entropy", "mse", "binary_cross_entropy", "huber"]
"""Losses that lnp knows by name; `lnp.losses.kinds` has what they are."""
Loss = LossName | Callable[[Any, Any], Any] | None
"""loss(outputs, targets), a name, or None for the model's own."""
Forward = Callable[[Any, Any], Any] | None
"""forward(model, inputs) -> outputs, or None to call the model."""
Parameters = Callable[[str], bool] | str | Iterable[str] | None
"""Which parameters: a predicate on names, a glob, names, or None for every trainable one."""
Update = Any
"""A vector in parameter space in the user's own form: {name: array}, a list, or a pytree of the parameters' structure.
"""
Seed = Any
"""Seed of the random signs: an integer, or a key of the framework."""
Group = Any
"""The processes that measure together: "auto", None, or a framework's group."""
