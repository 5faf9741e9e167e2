"""A model on the inputs of one batch, ready to run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lnp.contract.linearization import Vector, coupling_tolerance
from lnp.contract.options import Options
from lnp_jax import replay
from lnp_jax.fallback import Function, Split
from lnp_jax.model import Arrays, Structure
from lnp_jax.outputs import flatten
from lnp_jax.outputs import parts as parts_of
from lnp_jax.programs import operations_of, talking

BY_HAND = ("custom_vjp", "custom_transpose", "linear_call")
"""How the operations are called whose backward pass somebody has written. That of `jax.custom_jvp` is the transpose of
a linear function, whatever its rule says."""


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
    notes:
        What was frozen, and what was taken for parameters where that is not sure.
    talks:
        The operation by which it talks to other devices inside of `jax.shard_map`, or "".
    """

    function: Function
    parameters: Vector
    inputs: Any
    tree: Any
    split: Split
    types: frozenset
    custom_backward: bool
    notes: tuple[str, ...] = ()
    talks: str = ""

    def batch_outputs(self, parameters: Vector) -> jax.Array:
        """f, shape (N, K)."""
        return flatten(self.function(parameters, self.inputs))

    def some(self, index: Any, size: int) -> Network:
        """The same network on some samples, as a batch of their own."""
        split = self.split.some(index, size)
        return replace(self, split=split, inputs=split.inputs(split.rows))

    @property
    def tolerance(self) -> float:
        """The relative difference up to which two ways to compute the same agree: by the narrowest type inside."""
        return coupling_tolerance(jnp, max(self.types, key=lambda dtype: jnp.finfo(dtype).eps))


def bind(structure: Structure, arrays: Arrays, inputs: Any, options: Options) -> Network:
    """The model with its trained parameters apart, and batch statistics held if they are to be."""
    parameters = {name: jnp.asarray(arrays[name]) for name in structure.trained}
    rest = {name: value for name, value in arrays.items() if name not in parameters}
    batch = replay.traced(structure.call, parameters, rest, inputs)
    split = Split(inputs, jax.eval_shape(flatten, batch.tree).shape[0])

    def itself(parameters: Vector, inputs: Any) -> Any:
        return structure.call({**rest, **parameters}, inputs)

    held, notes = None, structure.notes
    if options.batch_statistics == "frozen":
        held = replay.held_function(structure.call, batch, parameters, rest, split)
        notes = notes if held is None else (*notes, replay.NOTE)
    operations = list(operations_of(batch.program.jaxpr))
    made = [out.aval.dtype for eqn in operations for out in eqn.outvars if hasattr(out.aval, "dtype")]
    given = [leaf.dtype for leaf in (*parameters.values(), *parts_of(batch.tree))]
    types = frozenset(dtype for dtype in (*made, *given) if jnp.issubdtype(dtype, jnp.inexact))
    by_hand = any(eqn.primitive.name.startswith(BY_HAND) for eqn in operations)
    if options.microbatch is not None and not split.possible:
        raise ValueError(
            f"microbatch={options.microbatch} was asked for, but no input runs over the {split.samples} samples along "
            "its first axis. Expected at least one that does. Leave microbatch unset."
        )
    talks = talking(batch.program.jaxpr)
    return Network(held or itself, parameters, inputs, batch.tree, split, types, by_hand, notes, talks)
