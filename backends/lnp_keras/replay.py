"""Batch normalisation in training mode, frozen at this batch's statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import keras
import numpy as np

from lnp.contract.trees import leaves
from lnp.per_sample.verdict import FROZEN_DIFFERS
from lnp_keras.losses import bare
from lnp_keras.model import Stateless, called, computes_narrowly, flat_layers, named_variables
from lnp_keras.state_guard import foreign_variables_kept, unchanged, untouched

NOTE = "batch normalisation in training mode keeps this batch's statistics"


class _Statistics(keras.StatelessScope):
    """Takes what normalisations with momentum 0 write, and lets them have written what they do by themselves.

    Attributes
    ----------
    written:
        {id of a moving statistic: the values that were written to it}.
    """

    def __init__(self, mapping: list, momenta: dict[int, float]) -> None:
        super().__init__(mapping, initialize_variables=False)
        self._momenta = momenta
        self.written: dict[int, list] = {}

    def add_update(self, update: tuple) -> None:
        variable, value = update
        if id(variable) in self._momenta:
            self.written.setdefault(id(variable), []).append(value)
            momentum = self._momenta[id(variable)]
            value = self.get_current_value(variable) * momentum + value * (1.0 - momentum)
        super().add_update((variable, value))


def normalisations(function: Stateless) -> list[int]:
    """Positions of the batch normalisations that may be in training mode."""
    model = function.model()
    kind = keras.layers.BatchNormalization
    return [i for i, layer in enumerate(flat_layers(model)) if isinstance(layer, kind) and layer.trainable]


def frozen(function: Stateless, values: dict, inputs: list) -> tuple[Stateless, list, tuple[str, ...]]:
    """The function with frozen statistics, those of each batch, and notes.

    Nothing is frozen where the outputs would be others than without, whatever a layer does with its statistics.
    """
    seen = [_apart(function, partial(_seen, function, values, x)) for x in inputs]
    used = [position for position in seen[0][0] if all(position in positions for positions, *_ in seen)]
    if not used:
        return function, [[] for _ in inputs], ()
    statistics = [
        [stats for p, stats in zip(positions, found, strict=True) if p in used] for positions, found, _ in seen
    ]
    held = replace(function, frozen=tuple(used))
    for x, found, (_, _, outputs) in zip(inputs, statistics, seen, strict=True):
        again = _apart(function, partial(held, values, {"inputs": x, "statistics": found}))
        if not _same(function.model(), bare(again), bare(outputs)):
            return function, [[] for _ in inputs], (FROZEN_DIFFERS,)
    return held, statistics, (NOTE,)


def _apart(function: Stateless, run: Callable[[], Any]) -> Any:
    """The result of an eager pass that leaves nothing behind, without a gradient."""
    with untouched():
        if keras.backend.backend() == "torch":
            import torch

            with torch.no_grad():
                return run()
        with foreign_variables_kept(function.model, function.forward):
            return run()


def _same(model: Any, one: Any, other: Any) -> bool:
    """Whether these are the same outputs, up to `coupling_tolerance` of the narrowest type that is computed in."""
    tolerance = 0.05 if computes_narrowly(model) else 4.0 * float(np.finfo("float32").eps) ** 0.5
    for a, b in zip(leaves(one), leaves(other), strict=True):
        if hasattr(b, "dtype") and keras.backend.is_float_dtype(keras.backend.standardize_dtype(b.dtype)):
            a, b = keras.ops.cast(a, "float32"), keras.ops.cast(b, "float32")
            apart, size = keras.ops.max(keras.ops.abs(a - b)), keras.ops.max(keras.ops.abs(b))
            if not bool(apart <= tolerance * size):  # also what is not finite
                return False
    return True


def _seen(function: Stateless, values: Mapping[str, Any], inputs: Any) -> tuple[list[int], list, Any]:
    """(positions of the layers that are in training mode and used once, [(mean, variance)] of shape (1, C) each, the
    outputs).

    With momentum 0 layers write the batch's mean and biased variance as their moving statistics.
    """
    model = function.model()
    known, layers = named_variables(model), flat_layers(model)
    positions = normalisations(function)
    momenta = {position: layers[position].momentum for position in positions}
    moving = {p: (layers[p].moving_mean, layers[p].moving_variance) for p in positions}
    scope = _Statistics(
        [(known[name], value) for name, value in values.items()],
        {id(variable): momenta[p] for p, variables in moving.items() for variable in variables},
    )
    try:
        for position in positions:
            layers[position].momentum = 0.0
        with unchanged(function.model, function.forward), scope:
            outputs = (function.forward or called)(model, inputs)
    finally:
        for position, momentum in momenta.items():
            layers[position].momentum = momentum
    used = [p for p in positions if all(len(scope.written.get(id(v), ())) == 1 for v in moving[p])]
    return used, [tuple(scope.written[id(v)][0][None] for v in moving[p]) for p in used], outputs
