"""A model on the inputs of one batch, ready to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from lnp.contract.linearization import coupling_tolerance
from lnp.contract.options import Options
from lnp_jax import fallback, replay
from lnp_jax.model import Arrays, Structure
from lnp_jax.outputs import flatten
from lnp_jax.outputs import parts as parts_of


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
        The outputs' structure, shapes and types.
    split:
        The inputs' rows.
    notes:
        What was frozen.
    """

    function: fallback.Function
    parameters: Mapping[str, jax.Array]
    inputs: Any
    tree: Any
    split: fallback.Split
    notes: tuple[str, ...] = ()

    def whole(self, parameters: Mapping) -> jax.Array:
        """f, shape (N, K)."""
        return flatten(self.function(parameters, self.inputs))

    def at(self, parameters: Mapping) -> Network:
        """The same at other parameters."""
        return replace(self, parameters=parameters)

    def tolerance(self, program: Any) -> float:
        """Up to which two ways to compute the same may differ: by the narrowest type in the program of one sample."""
        types = [leaf.dtype for leaf in (*self.parameters.values(), *parts_of(self.tree))]
        types += _types(program.jaxpr)
        return coupling_tolerance(jnp, max(types, key=lambda dtype: jnp.finfo(dtype).eps))


def _types(jaxpr: Any) -> set:
    """Of the floating-point numbers that a program makes."""
    made = {out.aval.dtype for eqn in jaxpr.eqns for out in eqn.outvars if hasattr(out.aval, "dtype")}
    inside = [part for eqn in jaxpr.eqns for part in core.jaxprs_in_params(eqn.params)]
    return {dtype for dtype in made if jnp.issubdtype(dtype, jnp.floating)}.union(*map(_types, inside))


def has_rules(jaxpr: Any) -> bool:
    """Whether a program holds derivatives of the user's own for the backward pass, through which JAX has no
    Jacobian-vector products.
    """
    inside = [part for eqn in jaxpr.eqns for part in core.jaxprs_in_params(eqn.params)]
    return any(eqn.primitive.name.startswith("custom_vjp") for eqn in jaxpr.eqns) or any(map(has_rules, inside))


def prepared(structure: Structure, arrays: Arrays, inputs: Any, options: Options) -> Network:
    """The model with its trained parameters apart, and batch statistics held if they are to be."""
    notes: tuple[str, ...] = ()
    if options.batch_statistics == "frozen":
        structure, arrays, notes = replay.frozen(structure, arrays, inputs)
    shown = structure.shown
    parameters = {shown[name]: jnp.asarray(arrays[name]) for name in structure.trained}
    rest = {name: value for name, value in arrays.items() if name not in shown}

    def function(parameters: Mapping, inputs: Any) -> Any:
        return structure.call(rest | {name: parameters[known] for name, known in shown.items()}, inputs)

    tree = jax.eval_shape(function, parameters, inputs)
    split = fallback.Split(inputs, jax.eval_shape(flatten, tree).shape[0])
    if options.microbatch is not None and not split.possible:
        raise ValueError(
            f"microbatch={options.microbatch} was asked for, but no input runs over the {split.samples} samples along "
            "its first axis. Expected at least one that does. Leave microbatch unset."
        )
    return Network(function, parameters, inputs, tree, split, notes)
