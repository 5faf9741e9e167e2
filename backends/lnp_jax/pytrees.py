"""Results as pytrees, so that compiled functions can return them."""

from __future__ import annotations

from dataclasses import fields

import jax

import lnp
from lnp.results.gradients import LossGradient
from lnp.spectral.spectrum import LanczosResult

STATIC = ("samples", "outputs", "estimator", "notes", "loss_name")
"""Fields that are known when a function is traced."""


def register() -> None:
    """Make lnp's results known to JAX."""
    for result in (lnp.Decomposition, lnp.Layer, lnp.Population, lnp.CrossResponse, LossGradient, LanczosResult):
        names = [field.name for field in fields(result)]
        static = [name for name in names if name in STATIC]
        jax.tree_util.register_dataclass(result, [name for name in names if name not in static], static)
