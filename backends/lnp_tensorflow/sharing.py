"""A training step and its measurement by one forward and one backward pass."""

from __future__ import annotations

import contextvars
from typing import Any

import tensorflow as tf

import lnp
from lnp.structure import map_leaves
from lnp_tensorflow.models import Structure, accepts, is_module, named, separate

WANTED: contextvars.ContextVar[list | None] = contextvars.ContextVar("gradients", default=None)
"""Where `evaluate` leaves the gradient of what it measures, if somebody wants it."""


def leave(structure: Structure, arrays: dict, gradients: dict[str, tf.Tensor]) -> None:
    """Hand the gradients to who wants them, in the parameters' shapes."""
    wanted = WANTED.get()
    assert wanted is not None, "evaluate() looks for it"
    sources = structure.sources(arrays)
    wanted.append({name: tf.reshape(g, sources[name].shape) for name, g in gradients.items()})


def value_and_grad(
    model: Any, batch: Any, loss: Any = None, **options: Any
) -> tuple[tuple[Any, lnp.Decomposition], Any]:
    """((loss, decomposition), gradients): what a training step needs, measured on the way.

    The forward pass and the gradient are the step's own, so that the measurement adds its probes alone.

        gradients = J^T g = dL / d theta

    Parameters
    ----------
    model, batch, loss, options:
        As for `lnp_tensorflow.decompose`.

    Returns
    -------
    loss:
        L. Terms that do not come from the outputs, such as regularisation, are in neither loss nor gradients.
    decomposition:
        A `lnp.Decomposition`.
    gradients:
        For a module a list in the order of `model.trainable_variables`, for `optimizer.apply_gradients`; with
        `parameters=`, of those that were picked. For (function, parameters) a structure like the parameters', with
        None at integers. Nothing is written to the model: statistics and seeds stay as they are. Batch normalisation by
        `batch_statistics="coupled"` differentiates through the statistics, as `tf.GradientTape` does.

    Raises
    ------
    TypeError, ValueError
        As `lnp.decompose`.

    Examples
    --------
    >>> import tensorflow as tf
    >>> class Line(tf.Module):
    ...     def __init__(self):
    ...         self.w = tf.Variable(tf.zeros((2, 1)))
    ...     def __call__(self, x):
    ...         return x @ self.w
    >>> model = Line()
    >>> (loss, d), gradients = value_and_grad(model, (tf.eye(2), tf.ones((2, 1))))
    >>> loss, d.chi_pos, gradients[0].numpy().ravel().tolist()
    (1.0, 0.5, [-1.0, -1.0])
    """
    if not accepts(model):
        raise TypeError(
            f"The model is a {type(model).__name__}. Expected a tf.Module or (function, parameters). For a Keras model "
            "call lnp_keras.value_and_grad."
        )
    from lnp_tensorflow.backend import decompose

    found: list = []
    token = WANTED.set(found)
    try:
        d = decompose(model, batch, loss, **options)
    finally:
        WANTED.reset(token)
    return (d.loss, d), _arranged(model, found[0], options)


def _arranged(model: Any, gradients: dict[str, tf.Tensor], options: dict) -> Any:
    """In the order of the module's trained variables, or in the structure of the parameters."""
    if not is_module(model):
        names = iter(named(model[1]))
        return map_leaves(lambda _: gradients.get(next(names)), model[1])
    structure, _, arrays = separate(model, options.get("forward"), options.get("parameters"))
    by_variable = {v.ref(): gradients[name] for name, v in structure.sources(arrays).items()}
    first = [v.ref() for v in model.trainable_variables if v.ref() in by_variable]
    return [by_variable[ref] for ref in (*first, *(ref for ref in by_variable if ref not in set(first)))]
