"""The backend's entry points: evaluate (traced), linearize, and decompose with TensorFlow's own options."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

import lnp
from lnp.contract.linearization import Linearization
from lnp.contract.options import Options
from lnp.contract.trees import leaves, map_leaves
from lnp.contract.validation import unpack
from lnp.contract.vectors import update_by_name
from lnp_tensorflow.compile_cache import Answer, Given, Plan, remember
from lnp_tensorflow.losses import in_order
from lnp_tensorflow.measurement import CONVERTED, needs_xla, run, run_inside
from lnp_tensorflow.model import Arrays, Snapshot, Structure, accepts, is_module, plain_state, separate
from lnp_tensorflow.record import record
from lnp_tensorflow.replay import forward
from lnp_tensorflow.state_guard import undisturbed
from lnp_tensorflow.strategies import outside_of_scope, whole
from lnp_tensorflow.updates import as_before

__all__ = ["accepts", "decompose", "evaluate", "linearize"]

_JIT = contextvars.ContextVar("jit_compile", default=False)


def decompose(model: Any, batch: Any, *args: Any, jit_compile: bool = False, **options: Any) -> lnp.Decomposition:
    """`lnp.decompose(model, batch, ...)`, with `jit_compile=True` compiled by XLA.

    Compiling takes seconds and pays where the same measurement is made many times.

    >>> import tensorflow as tf
    >>> function = lambda w, x: x @ w
    >>> d = decompose((function, tf.zeros((2, 1))), (tf.eye(2), tf.ones((2, 1))), jit_compile=True)
    >>> d.chi_pos
    0.5
    """
    with _jit(jit_compile):
        return lnp.decompose(model, batch, *args, **options)


@tf.autograph.experimental.do_not_convert
def evaluate(computation: Callable, model: Any, batches: tuple, options: Options, **operands: Any) -> Any:
    """Run the computation traced; numbers come back in one transfer. Inside a `tf.function`: as tensors."""
    with outside_of_scope():
        if isinstance(model, Snapshot):
            with as_before(model):
                return _evaluated(computation, model.model, batches, options, operands)
        return _evaluated(computation, model, batches, options, operands)


def _evaluated(computation: Callable, model: Any, batches: tuple, options: Options, operands: dict[str, Any]) -> Any:
    """What `evaluate` returns, outside of the scope of any strategy."""
    options = replace(options, loss=in_order(options.loss))
    structure, tree, arrays = separate(model, options.forward, options.parameters)
    if operands.get("update") is not None:
        operands["update"] = _as_vector(structure, arrays, operands["update"])
    operands = map_leaves(tf.convert_to_tensor, operands)
    pairs = _tensors(whole(batches, structure.sources(arrays).values()))
    fixed = replace(options, seed=None, parameters=None, forward=None)
    given = Given(tree, arrays, pairs, options.seed, operands)
    plan = Plan(computation, structure, fixed, _JIT.get(), loss_state=plain_state(options.loss))
    if tf.inside_function():
        with undisturbed(*structure.roots, options.loss):
            return run_inside(plan, given)
    answer = _traced(plan, given)
    for violated, message in zip(answer.violated, answer.messages, strict=True):
        if violated:
            raise ValueError(message)
    if any(answer.coupled):  # elsewhere such a measurement has been made again, jointly
        raise ValueError(
            f"microbatch={options.microbatch} was asked for, but the samples interact in this network: a sample's "
            "output or gradient changes when the others are left out. Expected independent samples. Leave microbatch "
            "unset, or remove what couples them."
        )
    result = answer.result
    if answer.notes and hasattr(result, "notes"):
        return replace(result, notes=(*result.notes, *answer.notes))
    return result


def linearize(model: Any, batch: Any, options: Options) -> Linearization:
    """The record for one batch, not traced."""
    if isinstance(model, Snapshot):
        raise ValueError(
            "A record of a snapshot was asked for. Expected a model: a record reads the variables when it is used, and "
            "by then they have their values of now. lnp.step_taken and lnp.decompose take snapshots."
        )
    options = replace(options, loss=in_order(options.loss))
    structure, tree, arrays = separate(model, options.forward, options.parameters)
    inputs, targets = unpack(_tensors(whole(batch, structure.sources(arrays).values())))
    with undisturbed(*structure.roots, options.loss):
        if is_module(model):
            structure = replace(structure, static=model)  # the record keeps it alive
        run = forward(structure, tree, arrays, inputs)
        return record(run, inputs, targets, options.seed, options)


def _traced(plan: Plan, given: Given) -> Answer:
    """The answer; a network with Python control flow over tensors is converted by AutoGraph, and one that fails without
    the parts that it has compiled by XLA keeps them: not every operation has a gradient elsewhere.
    """
    converted = replace(plan, structure=replace(plan.structure, autograph=True))
    if plan.structure in CONVERTED:
        return run(converted, given)
    try:
        return run(plan, given)
    except tf.errors.OperatorNotAllowedInGraphError:
        pass
    except tf.errors.OpError as error:
        if not needs_xla(error, plan, given, unpack(given.pairs[0])[0]):
            raise
    answer = run(converted, given)
    remember(CONVERTED, plan.structure, None)
    return answer


@contextlib.contextmanager
def _jit(on: bool) -> Iterator[None]:
    token = _JIT.set(on)
    try:
        yield
    finally:
        _JIT.reset(token)


def _tensors(tree: Any) -> Any:
    """NumPy arrays and variables as tensors; other leaves stay."""
    known = (np.ndarray, np.generic, tf.Variable)
    return map_leaves(lambda leaf: tf.convert_to_tensor(leaf) if isinstance(leaf, known) else leaf, tree)


def _as_vector(structure: Structure, arrays: Arrays, update: Any) -> Arrays:
    """The user's update as a vector in parameter space, zero for selected parameters that it leaves out."""
    sources = structure.sources(arrays)
    shapes = {name: tuple(source.shape) for name, source in sources.items()}
    expected = (
        f"a dictionary {{parameter name: tensor of its shape}}, or one tensor for each of the {len(shapes)} parameters "
        "in their order"
    )
    given = update_by_name(update, shapes, leaves, expected)
    return {n: tf.cast(given[n], s.dtype) if n in given else tf.zeros(s.shape, s.dtype) for n, s in sources.items()}
