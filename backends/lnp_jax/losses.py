"""Losses in JAX: their values, which one is meant, and whether it is a mean over samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lnp.contract import validation
from lnp.contract.linearization import Array
from lnp.contract.options import Options
from lnp.losses import kinds, mean_test
from lnp.losses.kinds import Given, Prepared
from lnp.losses.mean_test import Leaf
from lnp_jax.bound_model import Network
from lnp_jax.outputs import flatten, is_complex, is_measured, parts, rebuild
from lnp_jax.state_guard import restoring_state


@dataclass(frozen=True)
class BoundLoss:
    """A loss on the targets of one batch.

    Attributes
    ----------
    of:
        f (N, K) -> L, shape ().
    value, gradient:
        L and dL/df.
    prepared:
        What is known of it.
    separable:
        Whether it is a mean over samples, as known or as found out.
    alone:
        () -> (N,) the loss of each sample by itself; nan where it takes no single samples.
    """

    of: Callable[[Array], Array]
    value: Array
    gradient: Array
    prepared: Prepared
    separable: bool
    alone: Callable[[], Array]


def bind(options: Options, net: Network, outputs: Array, targets: Any) -> BoundLoss:
    """The user's loss on the outputs (N, K) and targets of a batch."""
    tree, targets = _outputs_tree(net), jax.tree.map(jnp.asarray, targets)
    if hasattr(targets, "shape"):
        validation.check_lengths(outputs.shape[0], targets.shape)
    made = rebuild(outputs, tree)
    prepared = restoring_state(prepare, options.loss)(options.loss, made, targets, options.loss_terms)
    function = restoring_state(prepared.function)

    def of(flat: Array) -> Array:
        value = function(rebuild(flat, tree), targets)
        if value is None:
            raise TypeError("The loss returned None. Expected an array of shape (). Does the function return it?")
        value = jnp.asarray(value)
        validation.check_loss(value.shape)
        if is_complex(value):
            raise ValueError(
                f"The loss is of type {value.dtype}. Expected a real number. Take its real part or modulus."
            )
        return jnp.sum(value).astype(flat.dtype)

    value, gradient = jax.value_and_grad(of)(outputs)
    wanted = options.split and options.population is not False
    known = kinds.separable(options.loss) or (wanted and found_mean(function, made, targets))
    return BoundLoss(of, value, gradient, prepared, known, lambda: _alone(function, made, targets, value))


def _alone(function: Callable, outputs: Any, targets: Any, like: Array) -> Array:
    """(N,) the loss of each sample by itself, or nan where it takes no single samples, whatever it raises."""
    samples = parts(outputs)[0].shape[0]

    def one(n: Array) -> Array:
        def row(leaf: Any) -> Any:
            over = jnp.ndim(leaf) and leaf.shape[0] == samples
            return jax.lax.dynamic_slice_in_dim(leaf, n, 1) if over else leaf

        return jnp.sum(function(*jax.tree.map(row, (outputs, targets)))).astype(like.dtype)

    try:
        return jax.vmap(one)(jnp.arange(samples))
    except Exception:
        return jnp.full(samples, jnp.nan, like.dtype)


def prepare(loss: str | Callable | None, outputs: Any, targets: Any, loss_terms: Any) -> Prepared:
    """The loss that the user means, where outputs may be of any structure."""
    if not callable(loss) and any(map(is_complex, jax.tree.leaves((outputs, targets)))):
        raise ValueError(
            f"The outputs or targets are complex, and loss={loss!r} is defined for real numbers. Expected a function "
            "loss(outputs, targets) that returns a real number, such as the mean of jnp.abs(outputs - targets) ** 2."
        )
    of_outputs, of_targets = _shape(outputs), _shape(targets)
    single = of_outputs is not None and of_targets is not None
    integer = single and jnp.issubdtype(targets.dtype, jnp.integer)
    first = of_outputs if of_outputs is not None else tuple(parts(outputs)[0].shape)
    return kinds.prepare(
        jnp, loss, Given(of_outputs, of_targets, integer, first), (outputs, targets), elementwise=ELEMENTWISE,
        cross_entropy=lambda axis, labels: _cross_entropy if labels else _soft_cross_entropy, loss_terms=loss_terms,
    )  # fmt: skip


def step_value(loss: str | Callable | None, outputs: Any, targets: Any) -> Array:
    """The loss of a batch as it is trained on: a callable of the user's on the outputs as they are, one of lnp's own in
    float32 or better.
    """
    if callable(loss):
        return loss(outputs, targets)
    targets = jax.tree.map(jnp.asarray, targets)

    def wide(leaf: Any) -> Any:
        return leaf.astype(jnp.result_type(jnp.float32, leaf.dtype)) if is_measured(leaf) else leaf

    outputs = jax.tree.map(wide, outputs)
    return prepare(loss, outputs, targets, None).function(outputs, targets)


def found_mean(function: Callable, outputs: Any, targets: Any) -> bool:
    """Whether a loss is found to be a mean over samples, on stand-ins of the shapes and types of its arguments."""
    of_outputs, treedef = jax.tree.flatten(outputs)
    of_targets, targets_treedef = jax.tree.flatten(targets)
    if not all(_drawable(leaf) for leaf in (*of_outputs, *of_targets)):
        return False
    floating = [n for n, leaf in enumerate(of_outputs) if is_measured(leaf)]

    def gradient(outputs: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> np.ndarray:
        leaves, others = (
            [jnp.asarray(array).astype(leaf.dtype) for array, leaf in zip(arrays, like, strict=True)]
            for arrays, like in ((outputs, of_outputs), (targets, of_targets))
        )

        def value(made: list[Array]) -> Array:
            given = dict(zip(floating, made, strict=True))
            whole = [given.get(n, leaf) for n, leaf in enumerate(leaves)]
            return function(jax.tree.unflatten(treedef, whole), jax.tree.unflatten(targets_treedef, others))

        found = jax.jit(lambda leaves: flatten(jax.grad(value)(leaves)))([leaves[n] for n in floating])
        return np.asarray(found)  # compared by NumPy, which compiles nothing

    with jax.ensure_compile_time_eval():
        drawn = [_leaf(leaf, is_measured(leaf)) for leaf in of_outputs], [_leaf(leaf, False) for leaf in of_targets]
        return mean_test.found_mean(np, gradient, drawn[0], drawn[1])


def _shape(tree: Any) -> tuple[int, ...] | None:
    """The shape of what is one array, else None."""
    return tuple(tree.shape) if hasattr(tree, "shape") else None


def _outputs_tree(net: Network) -> Any:
    """The outputs' structure, with the leaves that are not measured."""
    floating = len(parts(net.tree)) == len(jax.tree.leaves(net.tree))
    return net.tree if floating else net.function(net.parameters, net.inputs)


def _drawable(leaf: Any) -> bool:
    """Whether NumPy can draw stand-ins for an array: not for keys of random numbers."""
    return hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def _leaf(leaf: Any, of_output: bool) -> Leaf:
    """Shape and type; float32 for types that NumPy does not have."""
    dtype = np.dtype(leaf.dtype)
    return Leaf(tuple(leaf.shape), dtype.name if dtype.kind in "biufc" else "float32", of_output)


def _mse(outputs: Array, targets: Array) -> Array:
    return jnp.mean((outputs - targets.astype(outputs.dtype)) ** 2)


def _huber(outputs: Array, targets: Array) -> Array:
    distance = jnp.abs(outputs - targets.astype(outputs.dtype))
    return jnp.mean(jnp.where(distance < 1, 0.5 * distance**2, distance - 0.5))


def _binary_cross_entropy(outputs: Array, targets: Array) -> Array:
    return jnp.mean(jax.nn.softplus(outputs) - targets.astype(outputs.dtype) * outputs)


ELEMENTWISE = {"mse": _mse, "huber": _huber, "binary_cross_entropy": _binary_cross_entropy}


def _soft_cross_entropy(outputs: Array, targets: Array) -> Array:
    return -jnp.mean(jnp.sum(targets.astype(outputs.dtype) * jax.nn.log_softmax(outputs), axis=-1))


def _cross_entropy(outputs: Array, targets: Array) -> Array:
    """The mean over labels that are not ignored; labels out of range are taken in, and reported as violations."""
    kept = targets != kinds.IGNORE_INDEX
    labels = jnp.clip(targets, 0, outputs.shape[-1] - 1)[..., None]
    picked = jnp.take_along_axis(jax.nn.log_softmax(outputs), labels, axis=-1)[..., 0]
    return -jnp.sum(jnp.where(kept, picked, 0)) / jnp.sum(kept)
