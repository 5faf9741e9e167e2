"""A training step and its measurement by one forward and one backward pass."""

from __future__ import annotations

import contextvars
from typing import Any

import keras

import lnp
from lnp_keras.models import named_variables

WANTED: contextvars.ContextVar[list | None] = contextvars.ContextVar("gradients", default=None)
"""Where `evaluate` leaves the gradient of what it measures, if somebody wants it."""


def value_and_grad(
    model: Any, batch: Any, loss: Any = None, **options: Any
) -> tuple[tuple[Any, lnp.Decomposition], list]:
    """((loss, decomposition), gradients): what a training step needs, measured on the way.

    The forward pass and the gradient are the step's own, so that the measurement adds its probes alone.

        gradients = J^T g = dL / d theta

    Parameters
    ----------
    model, batch, loss, options:
        As for `lnp.decompose`.

    Returns
    -------
    loss:
        The compiled loss in training mode. Regularisation, and what layers add to the loss, is in neither loss nor
        gradients.
    decomposition:
        A `lnp.Decomposition`.
    gradients:
        A list of the framework's tensors in the order of `model.trainable_variables`, for `optimizer.apply`; with
        `parameters=`, of those that were picked. Nothing is written to the model: moving statistics and seeds stay as
        they are. Batch normalisation by `batch_statistics="coupled"` differentiates through the statistics, as `fit`
        does.

    Raises
    ------
    TypeError, ValueError
        As `lnp.decompose`.

    Examples
    --------
    >>> import keras, numpy
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    >>> model.compile(keras.optimizers.SGD(0.1), "mse")
    >>> batch = numpy.eye(2, dtype="float32"), numpy.ones((2, 1), "float32")
    >>> (loss, d), gradients = value_and_grad(model, batch)
    >>> model.optimizer.apply(gradients, model.trainable_variables)
    >>> loss, round(value_and_grad(model, batch)[0][0], 4)
    (1.0, 0.49)
    """
    if not isinstance(model, keras.Layer):
        raise TypeError(
            f"The model is a {type(model).__name__}. Expected a Keras model. For others call the value_and_grad of "
            "their framework's backend."
        )
    found: list = []
    token = WANTED.set(found)
    try:
        d = lnp.decompose(model, batch, loss, **options)
    finally:
        WANTED.reset(token)
    variables = named_variables(model)
    by_variable = {id(variables[name]): _shaped(gradient, variables[name]) for name, gradient in found[0].items()}
    first = [id(variable) for variable in model.trainable_variables if id(variable) in by_variable]
    return (d.loss, d), [by_variable[key] for key in (*first, *(key for key in by_variable if key not in set(first)))]


def _shaped(gradient: Any, variable: Any) -> Any:
    tensor = keras.ops.convert_to_tensor(gradient)
    return tensor if len(variable.shape) else keras.ops.reshape(tensor, ())
