"""Batch normalisation in training mode, frozen at this batch's statistics."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.extend import core

from lnp_jax.model import Arrays, Structure, call_model, merged
from lnp_jax.outputs import flatten
from lnp_jax.programs import reached
from lnp_jax.state_guard import restoring_state


@dataclass(frozen=True)
class Held:
    """A model with batch statistics that are held fixed.

    Attributes
    ----------
    structure, arrays:
        The model.
    original:
        The outputs (N, K) of the model as it is, which its own are to agree with.
    """

    structure: Structure
    arrays: Arrays
    original: jax.Array


NOTE = "batch normalisation in training mode keeps this batch's statistics"


def freeze_statistics(structure: Structure, arrays: Arrays, inputs: Any) -> Held | None:
    """The model with the statistics that its layers see on this batch, if it is an NNX module that has such layers.

    A forward pass with momentum 0 leaves the batch's mean and biased variance as the layers' running statistics,
    which they then use. Only what depends on the inputs is a statistic of the batch: that of a weight belongs to the
    function that is differentiated. Other libraries keep no such switch on the module; there, and where a call decides
    against the switch, the coupled function is measured.
    """
    if structure.kind != "nnx" or not _norms(merged(structure.static, structure.tree(arrays))):
        return None
    leaves, treedef = jax.tree.flatten(inputs)
    program, shapes = jax.make_jaxpr(_pass(structure, arrays, treedef), return_shape=True)(*leaves)
    moving = _moving(program, shapes)
    if not any(moving):
        return None
    original, statistics = jax.tree.unflatten(jax.tree.structure(shapes), core.jaxpr_as_fun(program)(*leaves))
    held = _with_statistics(
        structure, arrays, [pair if own else None for pair, own in zip(statistics, moving, strict=True)]
    )
    again, shapes = jax.make_jaxpr(_pass(*held, treedef), return_shape=True)(*leaves)
    still = [a and b for a, b in zip(_moving(again, shapes), moving, strict=True)]
    return None if any(still) else Held(*held, original)


def _pass(structure: Structure, arrays: Arrays, treedef: Any) -> Callable:
    """(leaves of the inputs) -> (outputs (N, K), [(mean, variance) that each layer holds after a forward pass])."""
    static, tree, forward = structure.static, structure.tree(arrays), structure.forward or call_model

    def run(*leaves: Any) -> tuple[jax.Array, list]:
        model = merged(static, tree)
        layers = _norms(model)
        for layer in layers:
            layer.momentum = 0.0
        outputs = flatten(forward(model, jax.tree.unflatten(treedef, leaves)))
        return outputs, [(layer.mean[...], layer.var[...]) for layer in layers]

    return restoring_state(run, structure.forward)


def _moving(program: Any, shapes: tuple) -> list[bool]:
    """For each layer whether the statistics that a pass leaves depend on the inputs."""
    flags = reached(program.jaxpr, [True] * len(program.jaxpr.invars))
    return [mean or var for mean, var in jax.tree.unflatten(jax.tree.structure(shapes), flags)[1]]


def _with_statistics(structure: Structure, arrays: Arrays, statistics: list) -> tuple[Structure, Arrays]:
    """The model whose layers use these statistics; those without any stay as they are."""
    nnx = sys.modules["flax.nnx"]
    model = merged(structure.static, structure.tree(arrays))
    for layer, pair in zip(_norms(model), statistics, strict=True):
        if pair is not None:
            layer.mean, layer.var = map(nnx.BatchStat, pair)
            layer.use_running_average = True
    definition, parameters, rest = nnx.split(model, nnx.Param, ...)
    leaves, treedef = jax.tree.flatten((parameters, rest))
    made = dict(zip(structure.names, leaves, strict=True)) | {name: arrays[name] for name in structure.complex}
    return replace(structure, static=definition, treedef=treedef), made


def _norms(model: Any) -> list:
    """The layers of batch normalisation, those of classes made from it too."""
    nnx = sys.modules["flax.nnx"]
    return [layer for _, layer in nnx.iter_graph(model) if isinstance(layer, nnx.BatchNorm)]
