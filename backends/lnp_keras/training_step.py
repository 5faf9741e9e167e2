"""A training step's loss and gradients as Keras computes them, and the decomposition of its batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

import lnp
from lnp.parameter_texts import parameters_of
from lnp_keras.compiled import is_compute_loss
from lnp_keras.losses import KerasLoss, adapted, named_loss, plain_value
from lnp_keras.model import called, named_variables, selected, unpack
from lnp_keras.state_guard import Scope


@parameters_of(lnp.decompose, without=("batches", "group"))
def value_and_grad(
    model: Any, batch: Any, loss: Any = None, **options: Any
) -> tuple[tuple[Any, lnp.Decomposition], list]:
    """((loss, decomposition), gradients): a training step's loss and gradients, and what was measured before it.

    Loss and gradients are bit for bit those of the plain step,

        outputs = model(inputs, training=True)
        loss = model.compute_loss(inputs, targets, outputs, sample_weight, training=True)

    differentiated by `tf.GradientTape`, `jax.value_and_grad` in a scope without state, or `torch.autograd`. Moving
    statistics and seeds advance once, as there; the trackers of `fit` (its mean loss, its metrics) are left alone. The
    measurement is made first, at the parameters before the update, and leaves nothing behind. `fit` compiles its step
    where it can, which rounds otherwise and on TensorFlow draws other dropout masks.

    Parameters
    ----------
    model, batch, loss, options:
        As for `lnp.decompose`. With a `loss=` that loss is the step's, alone. Whatever the options say of the
        measurement (`microbatch=`, `batch_statistics=`), the step is one pass over the whole batch in training mode.

    Returns
    -------
    loss:
        A tensor; with regularisation and what layers add, where it is the compiled one. The decomposition has them in
        its `total` alone.
    decomposition:
        A `lnp.Decomposition`.
    gradients:
        In the order of `model.trainable_variables`, for `optimizer.apply`; with `parameters=`, of those that were
        picked. None for what the loss does not depend on, on TensorFlow and PyTorch. Those of the scaled loss, if the
        model's optimizer scales it: it expects them.

    Raises
    ------
    TypeError, ValueError
        For a model, batch, loss or option that cannot be used, before the step has begun. ValueError inside a function
        that XLA compiles, which would fuse the step's operations with those of the measurement.

    Examples
    --------
    >>> import keras, numpy
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    >>> model.compile(keras.optimizers.SGD(0.1), "mse")
    >>> batch = numpy.eye(2, dtype="float32"), numpy.ones((2, 1), "float32")
    >>> (loss, d), gradients = value_and_grad(model, batch)
    >>> model.optimizer.apply(gradients, model.trainable_variables)
    >>> float(loss), round(float(value_and_grad(model, batch)[0][0]), 4)
    (1.0, 0.49)
    """
    if not isinstance(model, keras.Layer):
        raise TypeError(
            f"The model is a {type(model).__name__}. Expected a Keras model. For others call the value_and_grad of "
            "their framework's backend."
        )
    backend = keras.backend.backend()
    if backend == "tensorflow":
        from lnp_tensorflow.training_step import refuse_xla

        refuse_xla()
    d = lnp.decompose(model, batch, loss, **options)
    sources = _sources(model, options.get("parameters"))
    differentiate = {"tensorflow": _on_tensorflow, "jax": _on_jax, "torch": _on_torch}[backend]
    value, gradients = differentiate(model, sources, _step(model, batch, loss, options.get("forward")))
    return (value, d), gradients


def _step(model: Any, batch: Any, loss: Any, forward: Callable | None) -> Callable[[], Any]:
    """() -> the loss of the step, which writes to the model what a step writes."""
    inputs, targets, weight = unpack(batch)

    def run() -> Any:
        outputs = (forward or called)(model, inputs)
        if is_compute_loss(loss, model) or (loss is None and getattr(model, "compiled", False)):
            return model._compute_loss(x=inputs, y=targets, y_pred=outputs, sample_weight=weight, training=True)
        meant = adapted(loss)
        if isinstance(meant, KerasLoss):
            return plain_value(meant.loss, outputs, targets, weight)
        return loss(outputs, targets) if callable(loss) else named_loss(loss, outputs, targets)

    return run


def _sources(model: Any, parameters: Any) -> list:
    """The variables that are differentiated: first those that the model trains, in its order."""
    if parameters is None:
        return list(model.trainable_variables)
    variables = named_variables(model)
    picked = {id(variables[name]): variables[name] for name in selected(model, parameters)}
    first = [id(variable) for variable in model.trainable_variables if id(variable) in picked]
    return [picked[key] for key in (*first, *(key for key in picked if key not in set(first)))]


def _scaled(model: Any, value: Any) -> Any:
    """What the optimizer wants differentiated."""
    optimizer = getattr(model, "optimizer", None)
    return value if optimizer is None else optimizer.scale_loss(value)


def _on_tensorflow(model: Any, sources: list, run: Callable[[], Any]) -> tuple[Any, list]:
    import tensorflow as tf

    variables = [variable.value for variable in sources]
    with tf.GradientTape() as tape:
        tape.watch(variables)
        value = run()
        scaled = _scaled(model, value)
    return value, tape.gradient(scaled, variables)


def _on_torch(model: Any, sources: list, run: Callable[[], Any]) -> tuple[Any, list]:
    import torch

    leaves = [variable.value for variable in sources]
    frozen = [leaf for leaf in leaves if not leaf.requires_grad]
    try:
        for leaf in frozen:
            leaf.requires_grad_(True)
        value = run()
        gradients = torch.autograd.grad(_scaled(model, value), leaves, allow_unused=True)
    finally:
        for leaf in frozen:
            leaf.requires_grad_(False)
    return value.detach(), list(gradients)


def _on_jax(model: Any, sources: list, run: Callable[[], Any]) -> tuple[Any, list]:
    import jax

    written: list = []

    def function(values: list) -> tuple[Any, Any]:
        scope = Scope(list(zip(sources, values, strict=True)), sources)
        with scope:
            value = run()
            scaled = _scaled(model, value)
        updates = [update for key, update in scope.updates.items() if key not in trained]
        written[:] = [variable for variable, _ in updates]
        return scaled, (value, [new for _, new in updates])

    trained = {id(variable) for variable in sources}
    (_, (value, new)), gradients = jax.value_and_grad(function, has_aux=True)([v.value for v in sources])
    for variable, update in zip(written, new, strict=True):
        variable.assign(update)
    return value, gradients
