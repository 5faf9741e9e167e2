"""Batch normalisation in training mode, frozen at this batch's statistics."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import jax

from lnp_jax.model import Arrays, Structure, call_model
from lnp_jax.state_guard import restoring_state


def freeze_statistics(structure: Structure, arrays: Arrays, inputs: Any) -> tuple[Structure, Arrays, tuple[str, ...]]:
    """The model with the statistics that its layers see on this batch, if it is an NNX module that has such layers.

    A forward pass with momentum 0 leaves the batch's mean and biased variance as the layers' running statistics,
    which they then use. Other libraries keep no such switch on the module; there the coupled function is measured.
    """
    if structure.kind != "nnx":
        return structure, arrays, ()
    nnx = sys.modules["flax.nnx"]
    tree = jax.tree.unflatten(structure.treedef, [arrays[name] for name in structure.names])
    model = nnx.merge(structure.static, *tree, copy=True)
    layers = [m for _, m in nnx.iter_graph(model) if isinstance(m, nnx.BatchNorm) and not m.use_running_average]
    if not layers:
        return structure, arrays, ()
    seen = nnx.merge(structure.static, *tree, copy=True)
    watched = [m for _, m in nnx.iter_graph(seen) if isinstance(m, nnx.BatchNorm) and not m.use_running_average]
    for layer in watched:
        layer.momentum = 0.0

    def statistics() -> list[tuple[Any, Any]]:
        (structure.forward or call_model)(seen, inputs)
        return [(layer.mean[...], layer.var[...]) for layer in watched]

    for layer, (mean, var) in zip(layers, restoring_state(statistics, structure.forward)(), strict=True):
        layer.mean, layer.var = nnx.BatchStat(mean), nnx.BatchStat(var)
        layer.use_running_average = True
    definition, parameters, rest = nnx.split(model, nnx.Param, ...)
    leaves = jax.tree.leaves((parameters, rest))
    made = dict(zip(structure.names, leaves, strict=True))
    note = "batch normalisation in training mode keeps this batch's statistics"
    return replace(structure, static=definition, treedef=jax.tree.structure((parameters, rest))), made, (note,)
