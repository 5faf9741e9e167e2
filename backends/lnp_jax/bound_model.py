"""A model on the inputs of one batch, ready to run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lnp.contract.linearization import Vector, coupling_tolerance
from lnp.contract.options import Options
from lnp.per_sample.differences import frozen_agrees
from lnp_jax import replay
from lnp_jax.fallback import Function, Split
from lnp_jax.model import Arrays, Structure
from lnp_jax.outputs import flatten
from lnp_jax.outputs import parts as parts_of
from lnp_jax.programs import operations_of

BY_HAND = ("custom_vjp", "custom_transpose", "linear_call")
"""How the operations are called whose backward pass somebody has written. That of `jax.custom_jvp` is the transpose of
a linear function, whatever its rule says."""

KEPT = 1e-5
"""What outputs may differ by at least where statistics are held: Flax keeps those in float32, whatever the rest."""


@dataclass(frozen=True)
class Network:
    """A model on one batch, ready to run.

    Attributes
    ----------
    function:
        (parameters, inputs) -> outputs of any structure.
    parameters:
        {name: array} that are differentiated.
    inputs:
        Of the batch.
    tree:
        The outputs' structure, shapes and types, for the whole batch.
    split:
        The inputs' rows.
    types:
        Of the floating-point numbers in parameters, outputs and what lies between.
    custom_backward:
        Whether anything in it has a backward pass that somebody wrote by hand.
    original:
        The outputs (N, K) of the network as it is, where statistics are held fixed; else None.
    notes:
        What was frozen, and what was taken for parameters where that is not sure.
    """

    function: Function
    parameters: Vector
    inputs: Any
    tree: Any
    split: Split
    types: frozenset
    custom_backward: bool
    original: jax.Array | None = None
    notes: tuple[str, ...] = ()

    def batch_outputs(self, parameters: Vector) -> jax.Array:
        """f, shape (N, K)."""
        return flatten(self.function(parameters, self.inputs))

    def some(self, index: Any, size: int) -> Network:
        """The same network on some samples, as a batch of their own."""
        split = self.split.some(index, size)
        return replace(self, split=split, inputs=split.inputs(split.rows))

    def differs(self, outputs: jax.Array) -> jax.Array:
        """Whether the outputs with statistics held fixed are not those of the network as it is. Shape ()."""
        assert self.original is not None, "asked for where statistics are held fixed"
        agrees = frozen_agrees(jnp, outputs, self.original, max(self.tolerance, KEPT))
        return jnp.logical_not(agrees) & jnp.all(jnp.isfinite(self.original))

    @property
    def tolerance(self) -> float:
        """The relative difference up to which two ways to compute the same agree: by the narrowest type inside."""
        return coupling_tolerance(jnp, max(self.types, key=lambda dtype: jnp.finfo(dtype).eps))


def bind(structure: Structure, arrays: Arrays, inputs: Any, options: Options) -> Network:
    """The model with its trained parameters apart, and batch statistics held if they are to be."""
    held = replay.freeze_statistics(structure, arrays, inputs) if options.batch_statistics == "frozen" else None
    original, notes = None, structure.notes
    if held is not None:
        structure, arrays, original, notes = held.structure, held.arrays, held.original, (*notes, replay.NOTE)
    parameters = {name: jnp.asarray(arrays[name]) for name in structure.trained}
    rest = {name: value for name, value in arrays.items() if name not in parameters}

    def function(parameters: Vector, inputs: Any) -> Any:
        return structure.call({**rest, **parameters}, inputs)

    program, tree = jax.make_jaxpr(function, return_shape=True)(parameters, inputs)
    operations = list(operations_of(program.jaxpr))
    made = [out.aval.dtype for eqn in operations for out in eqn.outvars if hasattr(out.aval, "dtype")]
    given = [leaf.dtype for leaf in (*parameters.values(), *parts_of(tree))]
    types = frozenset(dtype for dtype in (*made, *given) if jnp.issubdtype(dtype, jnp.inexact))
    by_hand = any(eqn.primitive.name.startswith(BY_HAND) for eqn in operations)
    split = Split(inputs, jax.eval_shape(flatten, tree).shape[0])
    if options.microbatch is not None and not split.possible:
        raise ValueError(
            f"microbatch={options.microbatch} was asked for, but no input runs over the {split.samples} samples along "
            "its first axis. Expected at least one that does. Leave microbatch unset."
        )
    return Network(function, parameters, inputs, tree, split, types, by_hand, original, notes)
