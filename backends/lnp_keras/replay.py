"""Batch normalisation in training mode, frozen at this batch's statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from lnp_keras.model import Stateless, called, flat_layers, named_variables
from lnp_keras.state_guard import unchanged

NOTE = "batch normalisation in training mode keeps this batch's statistics"


class _Counting(keras.StatelessScope):
    """Counts how often each variable is written to."""

    def __init__(self, mapping: list) -> None:
        super().__init__(mapping, initialize_variables=False)
        self.counts: dict[int, int] = {}

    def add_update(self, update: tuple) -> None:
        self.counts[id(update[0])] = self.counts.get(id(update[0]), 0) + 1
        super().add_update(update)


def normalisations(function: Stateless) -> list[int]:
    """Positions of the batch normalisations that may be in training mode."""
    model = function.model()
    kind = keras.layers.BatchNormalization
    return [i for i, layer in enumerate(flat_layers(model)) if isinstance(layer, kind) and layer.trainable]


def seen(function: Stateless, values: Mapping[str, Any], inputs: Any) -> tuple[list[int], list]:
    """(positions of the layers that are in training mode and used once, [(mean, variance)] of shape (1, C) each).

    A pass with momentum 0 leaves the batch's mean and biased variance as the layers' moving statistics, in a scope
    that drops them.
    """
    model = function.model()
    known, layers = named_variables(model), flat_layers(model)
    scope = _Counting([(known[name], value) for name, value in values.items()])
    positions = normalisations(function)
    momenta = [layers[position].momentum for position in positions]
    try:
        for position in positions:
            layers[position].momentum = 0.0
        with unchanged(function.model, function.forward), scope:
            (function.forward or called)(model, inputs)
    finally:
        for position, momentum in zip(positions, momenta, strict=True):
            layers[position].momentum = momentum
    used = [p for p in positions if scope.counts.get(id(layers[p].moving_mean)) == 1 and not _renormalises(layers[p])]
    statistics = [
        tuple(scope.get_current_value(v)[None] for v in (layers[p].moving_mean, layers[p].moving_variance))
        for p in used
    ]
    return used, statistics


def _renormalises(layer: Any) -> bool:
    return bool(getattr(layer, "renorm", False))
